"""Figures of a length study show the numbers of the rows, say what is missing, and use the looks of every figure."""

import math
import re

import pytest
import vl_convert

from lookfar.errors import UserError
from lookfar.study.figures import looks
from lookfar.study.length_figures import accuracy, ranking, scratchpads
from lookfar.study.statistics import interval

SCHEMES = ("alibi", "kerple + dape_v2(kernel=3)", "rope")
LOOKS = looks({scheme: scheme for scheme in SCHEMES})


def row(scheme, value, *, seed=0, data="copy@1234abcd", length=30, **more):
    fixed = {"protocol": "generation", "metric": "accuracy", "count": 100, "trained": 20, "scratchpad": None}
    split = "longer" if length > 20 else "train_lengths"
    named = {"run": f"{scheme}-{seed}", "scheme": scheme, "seed": seed, "data": data, "length": length, "value": value}
    return fixed | named | {"split": split} | more


def panels(chart):
    return chart.to_dict().get("concat", [chart.to_dict()])


def drawn(panel, kind):
    """The data of the layers of one kind of mark."""
    return [
        value
        for layer in panel["layer"]
        if layer["mark"]["type"] == kind
        for value in layer.get("data", panel.get("data"))["values"]
    ]


def written(chart):
    """The texts of a figure."""
    svg = vl_convert.vegalite_to_svg(chart.to_dict(), vl_version="6.4" if "/v6" in str(chart.to_dict()) else "5.20")
    return re.findall(r"<text[^>]*>([^<]+)", svg)


# Accuracy


def test_lines_are_means_over_seeds_and_bands_their_intervals():
    rows = [row("alibi", value, seed=seed, length=30) for seed, value in enumerate((0.1, 0.5, 0.6))]
    rows += [row("alibi", 1.0, seed=seed, length=10) for seed in range(3)] + [row("rope", 0.3)]
    rows += [row("rope", 9.0, metric="first_error")]
    (panel,) = panels(accuracy(rows, LOOKS))
    lines = {(point["scheme"], point["length"]): point for point in drawn(panel, "line")}
    assert {key: point["value"] for key, point in lines.items()} == pytest.approx(
        {("alibi", 10): 1.0, ("alibi", 30): 0.4, ("rope", 30): 0.3}
    )
    band = {(point["scheme"], point["length"]): (point["low"], point["high"]) for point in drawn(panel, "area")}
    assert band.pop(("rope", 30)) == (None, None)
    assert band == {("alibi", 10): (1.0, 1.0), ("alibi", 30): interval([[0.1], [0.5], [0.6]])}


def test_every_task_and_scratchpad_has_its_panel_and_shade():
    rows = [row("alibi", 1.0, length=length) for length in (5, 30)]
    rows += [row("alibi", 1.0, data="sort@0", length=length, trained=8, scratchpad="full") for length in (4, 16)]
    found = panels(accuracy(rows, LOOKS))
    assert [panel["title"]["text"] for panel in found] == ["copy · no scratchpad", "sort · full"]
    assert [[(each["first"], each["last"]) for each in drawn(panel, "rect")] for panel in found] == [
        [(5, 20)],
        [(4, 8)],
    ]
    assert panels(accuracy(rows[:2], LOOKS))[0]["title"]["text"] == "copy"
    alone = panels(accuracy([row("alibi", 1.0, length=30), row("alibi", 1.0, length=40)], LOOKS))[0]
    assert not drawn(alone, "rect")  # nothing that was trained on is in sight


def test_what_is_no_number_breaks_the_line_and_fewer_seeds_are_hollow():
    rows = [row("alibi", 0.5, seed=seed, length=length) for seed in (0, 1) for length in (22, 24, 26, 28)]
    rows[1]["value"] = rows[5]["value"] = math.nan
    rows[2]["value"] = None
    (panel,) = panels(accuracy([*rows[:7], row("rope", 0.1, length=22)], LOOKS))
    lines = {(point["scheme"], point["length"]): (point["value"], point["seeds"]) for point in drawn(panel, "line")}
    assert lines["alibi", 24] == (None, "0 of 2")
    assert lines["alibi", 26] == lines["alibi", 28] == (0.5, "1 of 2")
    marks = [layer for layer in panel["layer"] if layer["mark"]["type"] == "point"]
    full, hollow = ({(each["scheme"], each["length"]) for each in layer["data"]["values"]} for layer in marks)
    assert [layer["mark"]["filled"] for layer in marks] == [True, False]
    assert full == {("alibi", 22), ("rope", 22)} and hollow == {("alibi", 26), ("alibi", 28)}
    assert "hollow: some seeds have no number" in panel["title"]["subtitle"]


def test_what_cannot_be_drawn_is_refused():
    for draw in (accuracy, scratchpads):
        with pytest.raises(UserError, match="no accuracy to draw"):
            draw([row("alibi", 1.0, metric="first_error")], LOOKS)
        with pytest.raises(UserError, match="'alibi' has two rows of accuracy for"):
            draw([row("alibi", 1.0), row("alibi", 0.5)], LOOKS)


# Ranks


def test_ranks_are_sorted_and_tell_what_is_missing():
    rows = [row("alibi", 0.2, seed=seed) for seed in (0, 1)] + [row("rope", 0.4, seed=seed) for seed in (0, 1)]
    rows += [row("alibi", 0.2, seed=2), row("rope", None, seed=2)]
    panel = ranking(rows, LOOKS).to_dict()
    assert [(bar["scheme"], bar["value"]) for bar in drawn(panel, "bar")] == [("alibi", 0.5), ("rope", 1.0)]
    assert panel["layer"][0]["encoding"]["y"]["sort"] == ["rope", "alibi"]
    notes = " ".join(panel["title"]["subtitle"])
    assert "over 2 cells (task, scratchpad and seed), 2 seeds" in notes
    assert "1 mean is missing: rope on copy, scratchpad none, seed 2, is not a number at length 30" in notes
    assert {"rope", "alibi", "1.0", "0.50"} <= set(written(ranking(rows, LOOKS)))


def test_one_seed_has_no_whiskers():
    panel = ranking([row("alibi", 0.2), row("rope", 0.4)], LOOKS).to_dict()
    assert not drawn(panel, "rule") and len(drawn(panel, "bar")) == 2


# Scratchpads


def test_bars_are_means_over_longer_lengths_and_seeds():
    rows = [row("alibi", value, seed=seed, length=length) for seed, length, value in LONGER]
    rows += [row("alibi", 1.0, length=10), row("rope", 0.5, scratchpad="full"), row("alibi", 0.1, scratchpad="full")]
    (panel,) = panels(scratchpads(rows, LOOKS))
    bars = {(bar["scratchpad"], bar["scheme"]): bar for bar in drawn(panel, "bar")}
    assert {key: bar["value"] for key, bar in bars.items()} == pytest.approx(
        {("none", "alibi"): 0.4, ("full", "rope"): 0.5, ("full", "alibi"): 0.1}
    )
    assert [(bar["low"], bar["high"]) for bar in drawn(panel, "rule")] == [interval([[0.2], [0.6]])]
    assert panel["layer"][0]["encoding"]["x"]["sort"] == ["none", "full"]
    assert "2 means are missing: rope on copy, scratchpad none" in " ".join(panel["title"]["subtitle"])


LONGER = [(0, 30, 0.1), (0, 40, 0.3), (1, 30, 0.5), (1, 40, 0.7)]  # seed, length, accuracy


# Looks


@pytest.mark.parametrize("draw", [accuracy, ranking, scratchpads])
def test_colours_are_those_of_every_figure(draw):
    rows = [row(scheme, 0.1 * place, seed=seed) for place, scheme in enumerate(SCHEMES) for seed in (0, 1)]
    found = str(draw(rows, LOOKS).to_dict()["config"])
    scale = next(
        layer["encoding"]["color"]["scale"]
        for layer in panels(draw(rows, LOOKS))[0]["layer"]
        if "color" in layer.get("encoding", {})
    )
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == {
        name: look.colour for name, look in LOOKS.items()
    }
    assert "#e6e8eb" in found  # the grid of the theme
    assert set(SCHEMES) <= set(written(draw(rows, LOOKS)))
