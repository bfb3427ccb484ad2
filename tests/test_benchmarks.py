"""The benchmarks: rivals compute what they are compared in, and rows say how they came about."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from lookfar.attention import reference

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks are no part of the package

from benchmarks import attention, gpu, measure, quick, rivals
from benchmarks.attention import SCHEMES, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # x-transformers uses it
]
NAMED = [
    (scheme, name)
    for scheme in SCHEMES
    for name in rivals.names(Case(scheme, "lookfar", "forward", 33).build(), "cpu", "forward")
]


def given(case):
    scheme, sight = case.build(), attention.sight(case)
    return scheme, sight, attention.tensors(case, scheme)[:3]


@pytest.mark.parametrize(("expression", "name"), NAMED)
def test_a_rival_computes_the_same_attention(expression, name):
    scheme, sight, tensors = given(Case(expression, name, "forward", 333, heads=4, width=16))
    torch.manual_seed(3)
    with mock.patch("torch.compile", lambda function, **options: function):
        attend, learned = rivals.RIVALS[name](scheme, sight)
    if name == "x-transformers" and learned:
        learned[0].data.copy_(next(scheme.parameters()).data)
    with torch.no_grad():
        torch.testing.assert_close(attend(*tensors), reference.attend(*tensors, sight, scheme), rtol=1e-4, atol=1e-5)


def test_flex_attention_is_not_patched_away():
    assert rivals.flex_attention is flex_attention and ("kerple", "FlexAttention") in NAMED


@pytest.mark.parametrize("name", ["sdpa dense bias", "x-transformers"])
def test_gradients_reach_what_a_rival_learns(name):
    scheme, sight, tensors = given(Case("t5", name, "forward+backward", 33, heads=4, width=16))
    attend, learned = rivals.RIVALS[name](scheme, sight)
    outputs = attend(*tensors)
    (gradient,) = torch.autograd.grad(outputs, learned, torch.randn_like(outputs))
    assert gradient.abs().max() > 0


def test_the_base_is_causal_attention_of_the_plain_heads():
    case = Case("nope", attention.BASE, "forward", 33, heads=4, width=16)
    scheme, sight, tensors = given(case)
    torch.testing.assert_close(rivals.plain(*tensors), reference.attend(*tensors, sight, scheme))
    scheme, sight, tensors = given(replace(case, step="decode"))
    assert tensors[0].shape[2] == 1
    torch.testing.assert_close(rivals.plain(*tensors), reference.attend(*tensors, sight, scheme))


def test_a_row_says_what_was_measured():
    cases = [
        Case("kerple", name, "forward", 48, heads=2, width=8) for name in ("lookfar", "lookfar chunked", "eager square")
    ]
    rows = attention.compare(cases, 2, memory=False)
    assert [row["implementation"] for row in rows] == [attention.BASE, *(case.implementation for case in cases)]
    assert [row["kernel"] for row in rows] == [None, "square", "chunked", None]
    assert rows[0]["ratio_to_causal"] == 1 and all(
        row["ratio_to_causal"] == row["seconds"] / rows[0]["seconds"] for row in rows
    )
    assert all(row["repeats"] == 2 and row["length"] == 48 for row in rows)


def test_operations_are_those_of_two_causal_products():
    case = Case("nope", "lookfar", "forward", 2048)
    assert case.operations(case.build()) == 4 * 8 * 2048**2 / 2 * 64
    both = replace(case, step="forward+backward")
    assert both.operations(both.build()) == 3.5 * case.operations(case.build())
    twice = replace(case, scheme="differential_v2")
    assert twice.operations(twice.build()) == 2 * case.operations(case.build())
    wide = replace(case, scheme="differential")  # values twice as wide
    assert wide.operations(wide.build()) == 1.5 * case.operations(case.build())


def test_rivals_take_turns_until_their_time_is_up():
    clock, order = [0.0], []

    def takes(name, seconds):
        def call():
            order.append(name)
            clock[0] += seconds

        return call

    with mock.patch.object(measure, "time", SimpleNamespace(perf_counter=lambda: clock[0])):
        times = measure.turns({"quick": takes("quick", 1.0), "slow": takes("slow", 4.0)}, 5, limit=6.0)
    assert order == ["quick", "slow", *["quick", "slow"] * 2, *["quick"] * 3]
    assert times["quick"] == measure.Time(1.0, 1.0, 5) and times["slow"] == measure.Time(4.0, 4.0, 2)


def test_what_is_entered_around_a_call_takes_none_of_its_time():
    clock, order = [0.0], []

    @contextmanager
    def around(name):
        clock[0] += 100.0
        order.append("in")
        yield
        order.append("out")
        clock[0] += 100.0

    def call():
        clock[0] += 1.0
        order.append("call")

    with mock.patch.object(measure, "time", SimpleNamespace(perf_counter=lambda: clock[0])):
        times = measure.turns({"one": call}, 2, limit=6.0, around=around)
    assert times["one"] == measure.Time(1.0, 1.0, 2) and order == ["in", "call", "out"] * 3


# What fails


def small(scheme, name="lookfar", step="forward"):
    return Case(scheme, name, step, 24, heads=2, width=8)


@contextmanager
def failing(**errors):
    """`attention.prepare`, which fails for some schemes."""
    prepare = attention.prepare

    def fails(case):
        if case.scheme in errors:
            raise errors[case.scheme]
        return prepare(case)

    with mock.patch.object(attention, "prepare", fails):
        yield


def test_what_cannot_be_prepared_is_left_out_and_told(capsys):
    errors = {"alibi": RuntimeError("no room\nin shared memory"), "t5": torch.OutOfMemoryError("8 GiB")}
    with failing(**errors):
        rows, left = attention.attempt([small(scheme) for scheme in ("alibi", "t5", "kerple")], 1, memory=False)
    assert [row["scheme"] for row in rows] == ["nope", "kerple"]
    assert [(row["scheme"], row["failed"]) for row in left] == [("alibi", True), ("t5", False)]
    assert left[0]["left_out"] == "RuntimeError: no room" and "memory" in left[1]["left_out"]
    told = capsys.readouterr().err
    assert "alibi by lookfar, 24 tokens" in told and "RuntimeError: no room" in told and "shared" not in told


def test_a_call_that_fails_in_a_later_turn_is_left_out():
    calls = iter([None, None])

    def third_fails():
        if next(calls, "third") == "third":
            raise RuntimeError("lost")

    prepare = attention.prepare
    with mock.patch.object(attention, "prepare", lambda case: third_fails if case.scheme == "t5" else prepare(case)):
        rows, left = attention.attempt([small("t5"), small("kerple")], 3, memory=False)
    assert [row["scheme"] for row in rows] == ["nope", "kerple"]
    assert [row["left_out"] for row in left] == ["RuntimeError: lost"]


def test_a_row_that_fails_is_left_out():
    with mock.patch.object(attention, "_peak", side_effect=torch.OutOfMemoryError("8 GiB")):
        rows, left = attention.attempt([small("alibi")], 1)
    assert rows == [] and [row["scheme"] for row in left] == ["nope", "alibi"]


def test_nothing_is_compared_with_a_base_that_fails():
    with failing(nope=RuntimeError("no flash")):
        rows, left = attention.attempt([small("alibi"), small("t5")], 1, memory=False)
    assert rows == [] and [row["scheme"] for row in left] == ["nope", "alibi", "t5"]
    assert all(row["failed"] for row in left)


def test_an_interrupt_is_no_failure():
    with failing(alibi=KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        attention.attempt([small("alibi")], 1, memory=False)


def test_an_error_is_raised_after_the_last_row():
    rows = []
    with (
        failing(alibi=RuntimeError("lost")),
        mock.patch.object(attention, "_peak"),
        mock.patch.object(attention, "_with_rivals", lambda case: [case, replace(case, implementation="eager square")]),
        pytest.raises(attention.LeftOut, match="6"),
    ):
        for row in attention.run(1, lengths=[16], schemes=["alibi(learned=true)", "alibi"]):
            rows.append((row["pass"], row["scheme"]))
    assert {("decode", "alibi(learned=true)"), ("forward", "nope")} <= {*rows}
    with failing(alibi=RuntimeError("lost")), pytest.raises(attention.LeftOut, match="1 of 2"):
        attention.compare([small("alibi")], 1, memory=False)


def test_every_size_of_flex_attention_is_compiled():
    compile_ = torch.compile
    torch.compiler.reset()
    cases = [replace(small("kerple", "FlexAttention"), length=length) for length in (16, 17)]
    with (
        mock.patch("torch.compile", lambda function, **options: compile_(function, backend="eager", **options)),
        torch._dynamo.config.patch(recompile_limit=1),
    ):
        for case in cases:
            with attention.around(case):
                attention.prepare(case)()
        with pytest.raises(Exception, match="fullgraph"):  # never the full square in silence
            attention.prepare(replace(cases[0], length=18))()


# What needs a GPU


def measured(monkeypatch, part, *answers):
    """All batches of rows of a part, and the cases of each comparison in it."""
    asked = []

    def attempt(cases, repeats, **options):
        asked.append(cases)
        return [{"measured": len(cases)}], []

    monkeypatch.setattr(gpu.attention, "attempt", attempt)
    monkeypatch.setattr(gpu, "ways", lambda case: ([case], []))
    return [row for batch in part(*answers) for row in batch], asked


def test_the_sizes_that_are_asked_for_come_first(monkeypatch):
    _, asked = measured(monkeypatch, gpu.every_kernel, float("inf"))
    sizes = list(dict.fromkeys((case.width, case.length) for cases in asked for case in cases))
    assert {*sizes[:6]} == {(width, length) for width in (64, 128) for length in (2048, 8192, 32768)}
    assert {length for _, length in sizes[:4]} == {2048, 32768}
    assert all([case.scheme for case in cases] == [*SCHEMES] for cases in asked)


def test_sizes_for_which_no_time_is_left_are_told(monkeypatch, capsys):
    rows, asked = measured(monkeypatch, gpu.every_kernel, -1.0)
    assert not asked and len(rows) == len(gpu.SIZES) * len(attention.PASSES)
    assert all("time" in row["left_out"] and not row["failed"] for row in rows)
    assert capsys.readouterr().err.count("no time is left") == len(rows)


def test_score_maps_are_measured_at_twelve_heads(monkeypatch):
    _, asked = measured(monkeypatch, gpu.score_maps, 0.0)
    assert {case.heads for cases in asked for case in cases} == {12}
    found = [(case.scheme, case.implementation, case.length) for cases in asked for case in cases]
    assert {
        ("kerple + dape_v2", "lookfar", 8192),
        ("kerple + dape_v2", "eager square", 8192),
        ("kerple + dape_v2", "lookfar", 32768),
    } <= {*found}


def test_kernels_and_rivals_are_timed_up_to_their_lengths(monkeypatch):
    monkeypatch.setattr(gpu, "LONGEST", {"eager square": 32, "sdpa dense bias": 40})
    monkeypatch.setattr(gpu, "CHOSEN", {"chunked": 32})
    case = Case("alibi", "lookfar", "forward", 32, heads=2, width=8)
    fast, slow = gpu.ways(case)
    ways = [each.implementation for each in fast]
    assert ways[0] == "lookfar" and len({*ways}) == len(ways) and not slow
    assert {"eager square", "sdpa dense bias", "x-transformers", "lookfar chunked"} <= {*ways}
    assert "lookfar reference" not in ways  # the eager square
    assert [each.implementation for each in gpu.ways(replace(case, length=40))[1]] == ["eager square"]
    cope = replace(case, scheme="cope", length=40)
    with mock.patch.object(gpu.kernels, "explain", lambda scheme, call: [("chunked", None), ("reference", None)]):
        assert "lookfar" in [each.implementation for each in gpu.ways(cope)[1]]
        assert not gpu.ways(replace(cope, step="decode"))[1]


@pytest.mark.parametrize(("failed", "code"), [(True, 1), (False, 0)])
def test_rows_are_written_after_each_size(monkeypatch, tmp_path, failed, code):
    def part(deadline):
        yield [{"length": 1}, {"length": 1, "left_out": "no time is left", "failed": False}]
        assert json.loads((tmp_path / "attention.jsonl").read_text()) == {"length": 1, "processor": "none"}
        yield [{"length": 2}]
        if failed:
            raise RuntimeError("gone\nfor good")

    monkeypatch.setattr(gpu, "PARTS", {"attention": part, "training": lambda deadline: iter([[{"scheme": "t5"}]])})
    monkeypatch.setattr(gpu.machine, "without_cuda", lambda: None)
    monkeypatch.setattr(gpu.machine, "facts", lambda device, command: {"processor": "none"})
    monkeypatch.setattr(sys, "argv", ["gpu", "--folder", str(tmp_path)])
    assert gpu.main() == code
    lines = {file.name: file.read_text().splitlines() for file in tmp_path.iterdir()}
    assert len(lines["attention.jsonl"]) == 2 and len(lines["training.jsonl"]) == 1
    assert len(lines["attention_left_out.jsonl"]) == 1 + failed and "training_left_out.jsonl" not in lines


def test_a_model_that_fails_leaves_the_others(monkeypatch):
    def model(scheme, length):
        if scheme == "kerple":
            raise RuntimeError("no kernel")
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(gpu, "_model", model)
    monkeypatch.setattr(gpu, "_step", lambda model, length: lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    rows = [row for batch in gpu.training(0.0) for row in batch]
    assert [row["scheme"] for row in rows if "left_out" in row] == ["kerple"] * 2
    assert [row["scheme"] for row in rows if "speed_over_nope" in row] == [
        scheme for scheme in gpu.TRAINED if scheme != "kerple"
    ] * 2


# The gate


def test_nothing_is_slower_within_the_margin():
    assert quick.slower({"alibi": 1.34, "t5": 0.5}, {"alibi": 1.0, "t5": 1.0, "cope": 9.0}) is None


def test_what_became_slower_is_named_with_both_ratios():
    told = quick.slower({"alibi": 1.0, "kerple": 2.8, "t5": 1.4}, {"alibi": 1.0, "kerple": 2.0, "t5": 1.0})
    assert "kerple from 2.00 to 2.80" in told and "t5 from 1.00 to 1.40" in told and "alibi" not in told


@pytest.mark.parametrize("ratio", [float("nan"), float("inf")])
def test_what_is_no_number_is_slower(ratio):
    assert "alibi" in quick.slower({"alibi": ratio}, {"alibi": 1.0})


def test_what_was_never_committed_is_named():
    assert "Not in the committed ratios: cope" in quick.slower({"cope": 1.0, "t5": 1.0}, {"t5": 1.0})


def gate(monkeypatch, folder, measurements, *arguments):
    """Exit code of the gate where each run of it finds the next of these ratios, and the runs that were asked for."""
    asked, each = [], iter(measurements)

    def ratios(schemes):
        asked.append([*schemes])
        found = next(each)
        return {scheme: found.get(scheme, 1.0) for scheme in schemes}

    monkeypatch.setattr(quick, "COMMITTED", folder / "quick.jsonl")
    monkeypatch.setattr(quick, "ratios", ratios)
    monkeypatch.setattr(sys, "argv", ["quick", *arguments])
    return quick.main(), asked


def test_the_gate_compares_with_what_it_wrote(monkeypatch, tmp_path, capsys):
    assert gate(monkeypatch, tmp_path, [])[0] == 1 and "is missing" in capsys.readouterr().out
    assert gate(monkeypatch, tmp_path, [{"t5": 2.0}], "--update")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "quick.jsonl").read_text().splitlines()]
    assert {row["scheme"]: row["ratio_to_causal"] for row in rows} == {**dict.fromkeys(quick.SCHEMES, 1.0), "t5": 2.0}
    assert gate(monkeypatch, tmp_path, [{"t5": 2.6}])[0] == 0


def test_the_gate_measures_again_what_seems_slow(monkeypatch, tmp_path, capsys):
    gate(monkeypatch, tmp_path, [{}], "--update")
    code, asked = gate(monkeypatch, tmp_path, [{"t5": 2.0, "cope": 3.0}, {"t5": 1.1, "cope": 2.0}, {"cope": 5.0}])
    assert asked == [[*quick.SCHEMES], ["t5", "cope"], ["cope"]]
    assert code == 1 and "cope from 1.00 to 2.00." in capsys.readouterr().out
