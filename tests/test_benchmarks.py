"""The benchmarks: rivals compute what they are compared in, and rows say how they came about."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from lookfar.attention import reference

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks are no part of the package

from benchmarks import attention, measure, quick, rivals
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
    with mock.patch("torch.compile", lambda function, dynamic: function):
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
