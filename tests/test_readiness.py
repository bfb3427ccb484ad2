"""The examination of a computer: what is wrong keeps training from starting; what is lacking comes with advice."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch

import lookfar
from lookfar import cli
from lookfar.errors import UserError
from lookfar.kernels import dispatch
from lookfar.training import readiness
from lookfar.training.readiness import Finding, can_start, examine


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, no compiler, no folder of the user's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("LOOKFAR_CACHE", str(tmp_path / "cache"))
    real = readiness._compile
    monkeypatch.setattr(readiness, "_compile", lambda device: Finding("compile", "well", "works"))
    return real


@pytest.fixture
def look(tmp_path):
    """The findings by their subjects."""
    return lambda **given: {each.subject: each for each in examine(tmp_path, **{"device": "cpu", **given})}


def test_a_computer_that_can_train_is_told_so(look, tmp_path):
    found = look()
    assert {"python", "torch", "device", "bfloat16", "disk", "cache", "hub", "compile"} < set(found)
    assert {f"kernel {name}" for name in lookfar.names("kernels")} < set(found)
    assert can_start(list(found.values()))
    assert all(each.advice for each in found.values() if each.state != "well")
    assert [each.name for each in tmp_path.iterdir()] == ["cache"] and not list((tmp_path / "cache").iterdir())


def test_a_device_that_is_not_there_is_wrong_and_told_once(look):
    found = look(device="nothing")
    assert found["device"].state == "wrong" and "There is no device 'nothing'" in found["device"].found
    assert [name for name, each in found.items() if each.state == "wrong"] == ["device"]
    assert not can_start(list(found.values()))


def test_an_old_torch_is_wrong(look, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.8.1+cu126")
    assert look()["torch"] == Finding("torch", "wrong", "2.8.1+cu126", 'pip install "torch>=2.9"')
    monkeypatch.setattr(torch, "__version__", "2.10.0a0")
    assert look()["torch"].state == "well"


@pytest.mark.parametrize(
    ("seconds", "fast", "state"), [(2.0, True, "lacking"), (0.5, True, "well"), (9.0, False, "well")]
)
def test_bfloat16_is_compared_with_float32(look, monkeypatch, seconds, fast, state):
    times = {torch.bfloat16: seconds, torch.float32: 1.0}
    monkeypatch.setattr(readiness, "_seconds", lambda dtype, device: times[dtype])
    monkeypatch.setattr(readiness, "fast_bfloat16", lambda device: fast)
    found = look()["bfloat16"]
    assert found.state == state and f"{1 / seconds:.2g} times" in found.found
    assert ("takes bfloat16" if fast else "takes float32") in found.found


def test_a_kernel_that_crashes_or_refuses_is_lacking_and_one_that_errs_is_wrong(look, monkeypatch):
    def crash(*given):
        raise RuntimeError("no such instruction\nat 0x0")

    square, chunked, sdpa = (dispatch._kernel(name) for name in ("square", "chunked", "sdpa"))
    monkeypatch.setattr(square, "attend", crash)
    monkeypatch.setattr(chunked, "attend", lambda queries, keys, values, *rest: queries + keys + values)
    monkeypatch.setattr(sdpa, "refusal", lambda scheme, call: "it is Sunday")
    found = look()
    assert (found["kernel square"].state, found["kernel square"].found) == ("lacking", "no such instruction")
    assert found["kernel chunked"].state == "wrong" and "off by" in found["kernel chunked"].found
    assert (found["kernel sdpa"].state, found["kernel sdpa"].found) == ("lacking", "refuses: it is Sunday")
    assert not can_start(list(found.values()))


def test_no_kernel_at_all_is_wrong(look, monkeypatch):
    def refuse(*given):
        raise UserError("The kernel x does not take this call: never.")

    monkeypatch.setattr(readiness, "_call", refuse)
    assert look()["kernels"].state == "wrong"


def test_a_folder_that_cannot_be_written_is_wrong(look, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOOKFAR_CACHE", str(tmp_path / "file" / "cache"))
    found = look()["cache"]
    assert found.state == "wrong" and "LOOKFAR_CACHE" in found.advice

    def full(**given):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(readiness.tempfile, "TemporaryFile", full)
    found = look()["disk"]
    assert (found.state, found.found) == ("wrong", f"{tmp_path}: No space left on device")


def test_the_folder_need_not_be_there_yet_and_little_room_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(readiness.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**29))
    found = next(each for each in examine(tmp_path / "not" / "yet", "cpu") if each.subject == "disk")
    assert found.state == "lacking" and "0.5 GiB free" in found.found and found.found.endswith(str(tmp_path))
    assert not (tmp_path / "not").exists()


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):  # the name that the library calls
        self.send_response(401)
        self.end_headers()

    def log_message(self, *given):
        """Nothing to show."""


def test_a_hub_that_answers_is_well_whatever_it_answers(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert readiness._hub().state == "well"


def test_a_hub_that_is_silent_or_absent_is_lacking_and_never_waited_for(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(readiness, "HUB_PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.perf_counter()
        found = readiness._hub()
        assert time.perf_counter() - started < 2
    assert found.state == "lacking" and can_start([found])
    found = readiness._hub()  # its port is closed now
    assert found.state == "lacking" and "refused" in found.found and "text_file" in found.advice
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert readiness._hub().state == "lacking"
    stuck = threading.Event()
    monkeypatch.setattr(readiness, "_ask", lambda endpoint: str(stuck.wait(5)))  # as a dead name server
    assert readiness._hub().found == "nonsense: no answer within 0.3 s"
    stuck.set()


def test_what_an_extra_lacks_is_named(monkeypatch):
    wanted = ["torch>=2.9", "datasets>=3; extra == 'hub'", 'nowhere_at_all>=1 ; extra == "track"']
    monkeypatch.setattr(readiness.metadata, "requires", lambda name: wanted)
    hub, track = readiness._extras()
    assert hub.subject == "extra hub"
    assert track == Finding("extra track", "lacking", "without nowhere_at_all", 'pip install "lookfar[track]"')


def test_a_compiler_that_fails_hangs_or_is_missing_is_lacking(alone, monkeypatch):
    device, answers = torch.device("cpu"), {}

    def answer(command, **given):
        if "error" in answers:
            raise subprocess.TimeoutExpired(command, given["timeout"])
        return SimpleNamespace(returncode=1, stdout="", stderr="In file\nfatal error: Python.h\n", **answers)

    monkeypatch.setenv("CXX", "g++-9")
    monkeypatch.setattr(readiness.subprocess, "run", answer)
    found = alone(device)
    assert (found.state, found.found) == ("lacking", "fatal error: Python.h") and "g++-9" in found.advice
    answers["error"] = True
    assert "not done within" in alone(device).found
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(readiness.shutil, "which", lambda name: None)
    assert alone(device).found == "no C++ compiler"


@pytest.mark.long
def test_the_compiler_is_really_tried(alone):
    assert alone(torch.device("cpu")).state == "well"


@pytest.mark.parametrize(("device", "code"), [("cpu", 0), ("nothing", 1)])
def test_the_exit_code_says_whether_training_can_start(device, code, tmp_path, monkeypatch, capsys):
    for words in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["lookfar", "doctor", "--folder", str(tmp_path), "--device", device, *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert (left.value.code or 0) == code
    out = capsys.readouterr().out
    assert ("Training can start." in out) == (code == 0)
    told = json.loads(out[out.index("{") :])
    assert told["ready"] == (code == 0)
    assert {"subject", "state", "found", "advice"} == set(told["findings"][0])
