"""The command line: a mistake is one sentence, help comes at once, and every verb works on a small run."""

import json
import subprocess
import sys
import time
import warnings
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_model

import lookfar
from lookfar import cli
from lookfar.batch import consecutive
from lookfar.cli.tables import show_rows
from lookfar.sight import Sight
from lookfar.training import export
from lookfar.training import folder as run_folder

TINY = """
[model]
width = 16
layers = 1
heads = 2
context = 16

[data]
source = "text_file"
path = "{text}"

[training]
updates = 3
batch = 2

[evaluation]
lengths = [16, 32]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(400)), encoding="utf-8")
    (folder / "tiny.toml").write_text(TINY.format(text=folder / "text.txt"), encoding="utf-8")
    return folder / "tiny.toml"


def run(monkeypatch, capsys, *words):
    """The exit code of a command, and what it printed on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["lookfar", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "alibi"
    words = [sys.executable, "-m", "lookfar", "train", recipe, "--folder", folder, "--set", "model.scheme=alibi"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_help_does_not_wait_for_torch():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "lookfar", "--help"], capture_output=True, text=True)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0 and "train" in done.stdout
    assert min(times) < 0.5
    code = "import sys, lookfar.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    "verb",
    [
        "analyze",
        "train",
        "study",
        "evaluate",
        "report",
        "methods",
        "explain",
        "export",
        "generate",
        "schedule",
        "doctor",
        "duplicates",
        "sight",
        "tasks",
    ],
)
def test_help_of_every_verb_shows_an_example(verb, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, verb, "--help")
    assert code == 0 and "Example:" in out


MISTAKES = {
    "model.scheme=alibbi": "Did you mean 'alibi'",
    "model.scheme=rope(bsae=3)": "Did you mean 'base'",
    "model.scheme=rope + sinusoidal + learned": "cannot be combined",
    "model.scheme=learned": "model.positions=32",
    "model.heads=5": "must divide width",
    "model.wdith=5": "Did you mean 'width'",
    "evaluation.lengths=[0]": "greater than or equal to 1",
    'evaluation.protocols=["slding"]': "Did you mean 'sliding'",
    "data.source=python_libary": "Did you mean 'python_library'",
    "data.path=/nowhere/at/all": "/nowhere/at/all",
    "model.context=100000": "100",
    "training.numbering=randomised(largest=99)": "Did you mean 'randomized'",
    "model.device=nothing": "There is no device",
    "training.schedule=cosin": "Did you mean 'cosine'",
    "training.schedule=wsd_s(budgets=[2, 3], decay=0.6)": "take a smaller decay, or a budget of 7.",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(override, recipe, tmp_path, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "train", recipe, "--folder", tmp_path / "run", "--set", override)
    assert code == 2
    assert err.startswith("lookfar: ") and MISTAKES[override] in err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_files_that_cannot_be_read_are_told(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.toml").write_text("[model]\nwidth = = 3\n", encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes(b"abc\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    for words, told in (
        (["train", tmp_path / "broken.toml"], "line 2, column 9"),
        (["train", tmp_path / "none.toml"], "There is no recipe"),
        (["train", recipe, "--set", f"data.path={tmp_path / 'bytes.txt'}"], "byte 3"),
        (["train", recipe, "--set", f"data.path={tmp_path / 'empty.txt'}"], "is empty"),
        (["train", recipe, "--folder", tmp_path / "empty.txt" / "run"], "cannot be written"),
        (["evaluate", tmp_path], "is not a run's folder"),
        (["explain", "alibbi"], "Did you mean 'alibi'"),
        (["methods", "alibbi"], "Did you mean 'alibi'"),
        (["report", tmp_path / "nothing"], "nothing"),
    ):
        code, _, err = run(monkeypatch, capsys, *words)
        assert code == 2 and err.startswith("lookfar: ") and told in err, err


def test_a_run_is_trained_measured_and_shown(trained):
    rows = [json.loads(line) for line in (trained / "rows.jsonl").read_text().splitlines()]
    assert {(row["protocol"], row["length"]) for row in rows if row["metric"] == "perplexity"} == {
        (protocol, length) for protocol in ("non_overlapping", "sliding") for length in (16, 32)
    }
    assert [json.loads(line)["update"] for line in (trained / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert (trained / "checkpoints" / "3" / "model.safetensors").exists()


def test_other_text_of_n_bytes_scores_all_but_the_first(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "other.txt").write_text("x" * 100, encoding="utf-8")
    words = [
        "evaluate",
        trained,
        "--lengths",
        "16",
        "--protocol",
        "sliding(stride=4)",
        "--data",
        tmp_path / "other.txt",
    ]
    code, out, _ = run(monkeypatch, capsys, *words)
    assert code == 0 and "sliding(stride=4)" in out
    rows = [json.loads(line) for line in (trained / "rows.jsonl").read_text().splitlines()]
    counts = {row["count"] for row in rows if row["data"].startswith("other.txt@")}
    assert counts == {99}


def test_a_damaged_checkpoint_is_named(trained, tmp_path, monkeypatch, capsys):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "3" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = run(monkeypatch, capsys, "evaluate", tmp_path / "run")
    assert "warning: " in err and "passed over" in err
    assert code == 2 and "no whole checkpoint" in err and "Traceback" not in err


def test_a_model_writes_on(trained, monkeypatch, capsys):
    words = ["generate", trained, "--prompt", "line", "--tokens", "5", "--temperature", "0"]
    code, out, _ = run(monkeypatch, capsys, *words)
    assert code == 0 and out.startswith("line")
    code, _, err = run(monkeypatch, capsys, "generate", trained, "--prompt", "")
    assert code == 2 and "prompt is empty" in err


def test_the_weights_of_a_run_are_exported(trained, tmp_path, monkeypatch, capsys):
    file, folder, before = tmp_path / "deep" / "alibi.safetensors", tmp_path / "alibi", lookfar.load(trained)
    for place, weights in ((file, file), (folder, folder / "model.safetensors")):
        code, out, _ = run(monkeypatch, capsys, "export", trained, "--to", place)
        assert code == 0 and str(weights) in out
        assert weights.read_bytes() == (trained / "checkpoints" / "3" / "model.safetensors").read_bytes()
        assert sorted(each.name for each in file.parent.iterdir()) == ["alibi.safetensors"]
    assert sorted(each.name for each in folder.iterdir()) == ["model.safetensors", "run.toml", "tokenizer.json"]
    assert all((folder / name).read_bytes() == (trained / name).read_bytes() for name in ("run.toml", "tokenizer.json"))
    again = lookfar.Decoder(run_folder.read(folder)[0].model)
    load_model(again, folder / "model.safetensors")
    assert all(map(torch.equal, again.parameters(), before.parameters()))


def test_an_export_overwrites_only_where_it_is_asked_to(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.safetensors").write_text("mine")
    (tmp_path / "run.toml").write_text("mine")
    for place in (tmp_path / "own.safetensors", tmp_path):
        code, _, err = run(monkeypatch, capsys, "export", trained, "--to", place)
        assert code == 2 and "exists already; name another place, or add --overwrite." in err
    assert {each.read_text() for each in tmp_path.iterdir()} == {"mine"}
    for which in ("best", "4", "lats"):
        code, _, err = run(monkeypatch, capsys, "export", trained, "--to", tmp_path, "--overwrite", "--which", which)
        assert code == 2 and repr(which) in err
    assert {each.read_text() for each in tmp_path.iterdir()} == {"mine"}
    for place in (tmp_path / "own.safetensors", tmp_path):
        assert run(monkeypatch, capsys, "export", trained, "--to", place, "--overwrite", "--which", "3")[0] == 0
    assert len({each.read_bytes() for each in tmp_path.glob("*.safetensors")}) == 1


def test_an_export_that_breaks_off_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(tensors, file, metadata):
        file.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        export.export(trained, tmp_path / "alibi.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["nope", *lookfar.names("methods")])
def test_every_method_has_a_page(name, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "methods", name)
    assert code == 0 and "arXiv" in out and "Kernels" in out
    assert "Decoding: " in out and "Known quirks: " in out and len(out.split("Known quirks: ")[1]) > 40


def test_sight_draws_what_the_mask_says(tmp_path, monkeypatch, capsys):
    asked = ["--documents", "..aaabb", "--window", 2, "--slots", 2, "--ends", "5,7"]
    code, out, _ = run(monkeypatch, capsys, "sight", *map(str, asked), "--figure", str(tmp_path / "sight.svg"))
    assert code == 0
    rows = [line.split()[2:] for line in out.splitlines() if "◆" in line and "itself" not in line]
    drawn = [[mark in "●◆" for mark in row] for row in rows]
    documents = torch.tensor([[-1, -1, 0, 0, 0, 1, 1]])
    known = {"positions": consecutive(documents), "documents": documents, "window": 2, "ends": torch.tensor([[5, 7]])}
    assert drawn == Sight.slots(7, 2, **known).visible()[0, 0].tolist()
    assert out.splitlines()[1].split() == ["position", "0", "0", "0", "1", "2", "0", "1", "3", "2"]
    figure = ElementTree.parse(tmp_path / "sight.svg").getroot()
    assert len(figure.findall("{*}rect")) == 81


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--documents", "aa1"], "'1' in --documents is neither a letter nor a dot"),
        (["--documents", "aab", "--tokens", "5"], "has 3 tokens, not 5"),
        (["--ends", "3"], "Only slots have --ends"),
        (["--slots", "2", "--ends", "3"], "names 1 places for 2 slots"),
        (["--slots", "1", "--ends", "x"], "--ends 'x' is not a list"),
        (["--slots", "1", "--ends", "9"], "between 0 and 8"),
        (["--figure", "sight.png"], "name it sight.svg"),
        (["--figure", "."], "is not an SVG"),
        (["--figure", "nowhere/sight.svg"], "There is no folder nowhere"),
        (["--documents", ""], "names no token"),
    ],
    ids=str,
)
def test_a_sight_that_cannot_be_is_told(asked, message, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "sight", *asked)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_recipe_of_the_other_kind_names_the_other_verb(monkeypatch, capsys, tmp_path):
    (tmp_path / "study.toml").write_text("[study]\nschemes = ['rope']\nseeds = [0]\n")
    (tmp_path / "run.toml").write_text("[model]\nwidth = 16\n")
    code, _, err = run(monkeypatch, capsys, "train", str(tmp_path / "study.toml"), "--folder", str(tmp_path / "a"))
    assert code == 2 and "use `lookfar study`" in err
    code, _, err = run(monkeypatch, capsys, "study", str(tmp_path / "run.toml"), "--folder", str(tmp_path / "b"))
    assert code == 2 and "use `lookfar train`" in err and not (tmp_path / "b").exists()


def test_explain_answers_for_decoding_and_for_a_gpu_that_is_not_here(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "explain", "cope", "--length", "2048", "--queries", "1", "--inference")
    assert code == 0 and "the last 1 of 2,048 tokens" in out
    assert ["chunked", "taken"] in [line.split() for line in out.splitlines()]
    code, out, _ = run(monkeypatch, capsys, "explain", "kerple", "--device", "cuda", "--dtype", "float16")
    assert code == 0 and "float16, cuda" in out
    code, _, err = run(monkeypatch, capsys, "explain", "kerple", "--length", "8", "--queries", "9")
    assert code == 2 and "9 queries are more than the 8 tokens" in err


def test_explain_names_the_kernel_and_each_refusal(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "explain", "kerple + dape_v2", "--length", "2048")
    assert code == 0 and "taken" in out and "rewrites the scores" in out
    assert "refuses: there are no slots" in out
    for kernel in lookfar.names("kernels"):
        assert kernel in out


def test_rows_of_several_budgets_and_numberings_stand_in_lines_of_their_own(capsys):
    about = {"scheme": "rope", "protocol": "sliding", "length": 8, "metric": "perplexity", "data": "text"}
    rows = [{**about, "value": 5.25, "update": 40}, {**about, "value": 4.25, "update": 1080}]
    rows += [{**about, "value": 7.75, "update": 1080, "numbering": "interpolated"}]
    show_rows(rows)
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rope", "sliding,", "after", "40", "updates", "5.25"] in told
    assert ["rope", "sliding,", "after", "1,080", "updates", "4.25"] in told
    assert ["rope", "sliding,", "interpolated,", "after", "1,080", "updates", "7.75"] in told
    show_rows(rows[:1])
    assert ["rope", "sliding", "5.25"] in [line.split() for line in capsys.readouterr().out.splitlines()]
