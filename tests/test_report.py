"""The report: its table, its curves, what it lists, and that it is whole, safe and offline."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from lookfar.errors import UserError
from lookfar.study import figures
from lookfar.study.position_figures import by_position
from lookfar.study.records import collect, name_series
from lookfar.study.report import write_report

NASTY = '</script><b>bold & "quoted"</b>'
EXPLODES = {64: 6.0, 128: 60.0, 256: 600.0}
FLAT = {64: 5.0, 128: 5.0, 256: 5.0}


def make_run(
    folder: Path,
    scheme: str = "alibi",
    seed: int = 0,
    perplexities: dict[int, float] | None = None,
    data: str = "text@1a2b",
    width: int = 32,
    updates: int = 30,
) -> Path:
    """The folder of a run as the training leaves it; without perplexities, of a run that was not measured."""
    folder.mkdir(parents=True)
    settings = {
        "model": {"scheme": scheme, "width": width, "layers": 2, "heads": 4, "context": 64},
        "data": {"source": "text_file"},
        "training": {"updates": 30, "batch": 8, "rate": 0.003, "seed": seed},
        "versions": {"data": data},
    }
    toml = "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
        for name, section in settings.items()
    )
    (folder / "run.toml").write_text(toml, encoding="utf-8")
    lines = [{"update": u, "loss": 5.0 / u**0.3, "rate": 0.003} for u in range(1, updates + 1)]
    lines += [{"update": updates, "valid_loss": 2.0}, {"event": "checkpoint"}]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n" + '{"update": 31, "lo')
    if perplexities is not None:
        about = {"run": folder.name, "scheme": scheme, "seed": seed, "context": 64, "data": data}
        training = {**about, "protocol": "training", "length": 64, "count": 30}
        values = {"parameters": 12_500_000, "tokens_per_second": 2000 + 10 * seed, "training_seconds": 125.0}
        rows = [{**training, "metric": metric, "value": value} for metric, value in values.items()]
        rows += [
            {**about, "protocol": protocol, "length": n, "metric": metric, "value": p, "count": 4095, "unit": "byte"}
            for protocol in ("non_overlapping", "sliding(stride=16)")
            for n, p in perplexities.items()
            for metric in ("perplexity", "loss", "bits_per_byte")
        ]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two good schemes, one that explodes and a nasty name; one run failed, one stopped, one never began."""
    folder = tmp_path_factory.mktemp("work") / "study"
    make_run(folder / "alibi-s0", "alibi", 0, {64: 5.0, 128: 4.8, 256: 4.4})
    make_run(folder / "alibi-s1", "alibi", 1, {64: 5.2, 128: 5.2, 256: 5.2})
    make_run(folder / "kerple-s0", "kerple", 0, {64: 4.9, 128: 4.9, 256: 4.9})
    make_run(folder / "sinusoidal-s0", "sinusoidal", 0, EXPLODES)
    make_run(folder / "nasty-s0", NASTY, 0, {64: 7.0, 128: math.nan})
    make_run(folder / "rope-s0", "rope", 0, updates=12)
    (make_run(folder / "t5-s0", "t5", 0) / "error.txt").write_text("Traceback\n  line\nMemoryError: too <large>\n")
    (folder / "study.toml").write_text('[study]\nschemes = ["alibi", "t5", "fire"]\nseeds = [0]\ntitle = "A & B"\n')
    every = "".join(file.read_text() for file in sorted(folder.glob("*/rows.jsonl")))
    (folder / "rows.jsonl").write_text(every)  # as a study gathers them: the same rows once more
    return folder


@pytest.fixture(scope="module")
def page(study: Path) -> str:
    """The page of the study, drawn without pandas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        path = write_report([study])
    assert path == study / "report.html"
    return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Reads a page as a browser would: the cells of its tables, the text, the scripts, and every attribute."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts[-1] += data
            return
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row and row[0].strip() == name)

    def charts(self) -> list[dict]:
        return [json.loads(script) for script in self.scripts if script.startswith("{")]


def marks(chart: dict, mark: str) -> list[dict]:
    """The data of all layers of a chart that draw with a mark, and do not name a curve."""
    layers = [layer for layer in chart["layer"] if layer["mark"]["type"] == mark and "xOffset" not in layer["mark"]]
    return [point for layer in layers for point in layer["data"]["values"]]


def test_the_table_holds_mean_deviation_speed_and_tokens_scored(page: str) -> None:
    alibi = Reader(page).row("alibi")
    assert alibi[1:5] == ["2", "12.500", "2,005", "2 min 05 s"]
    assert alibi[5:8] == ["5.10± 0.14", "5.00± 0.28", "4.80± 0.57"]  # mean and n − 1 deviation of two seeds, by hand
    assert alibi[8:11] == alibi[5:8]
    assert Reader(page).row("tokens scored")[5:] == ["4,095"] * 6


def test_a_run_that_was_not_measured_has_no_line_in_the_table(page: str) -> None:
    assert not [row for row in Reader(page).rows if row and row[0].strip() in ("rope", "t5")]


def test_the_best_of_a_column_is_bold(page: str) -> None:
    bold = {name: re.findall(r"<b>([\d.]+)", _line(page, name)) for name in ("alibi", "kerple", "sinusoidal")}
    assert bold["kerple"] == ["4.90"] * 4  # at 1× and 2× of both protocols
    assert bold["alibi"] == ["2", "4.80", "4.80"]  # the speed, and at 4×
    assert bold["sinusoidal"] == []


def _line(page: str, name: str) -> str:
    return re.findall(rf'<tr data-series="{name}">.*?</tr>', page, re.S)[0]


def test_a_value_that_is_not_a_number_is_shown_and_sorts_last(page: str) -> None:
    row = Reader(page).row(NASTY)
    assert row[6] == "NaN"
    assert row[7] == "–"
    assert '<td data-value="" title="nan">NaN</td>' in page


def test_names_cannot_inject_markup(page: str) -> None:
    reader = Reader(page)
    assert NASTY not in page
    assert reader.row(NASTY)
    assert any(NASTY in json.dumps(chart, ensure_ascii=False).replace('\\"', '"') for chart in reader.charts())
    assert "A & B" in reader.text


def test_unfinished_failed_and_unbegun_runs_are_listed(page: str) -> None:
    text = Reader(page).text
    assert "rope-s0 (rope, seed 0): not measured, 12 of 30 updates are logged." in text
    assert "t5-s0 (t5, seed 0): failed (MemoryError: too <large>), 30 of 30 updates are logged." in text
    assert "fire, seed 0: not begun." in text
    assert "alibi, seed 0: not begun" not in text


def test_the_head_says_what_was_trained(page: str) -> None:
    text = Reader(page).text
    for fact in (
        "2 layers",
        "width 32",
        "12.500 million parameters",
        "text@1a2b",
        "batches of 8 sequences of 64 tokens",
    ):
        assert fact in text
    assert "seeds 0, 1" in text
    assert "cut into consecutive blocks" in text
    assert "Windows of the length move by a stride" in text


def test_the_page_loads_nothing(page: str) -> None:
    reader = Reader(page)
    loaded = [value for name, value in reader.attributes if name in ("src", "href", "action", "data") and value]
    assert set(loaded) == {f"figures/{name}.{kind}" for name in ("perplexity", "loss") for kind in ("svg", "pdf")}
    assert not set(reader.tags) & {"link", "img", "iframe", "object"}
    assert "@import" not in page.partition("</style>")[0]
    assert "default-src 'none'" in page
    assert len(page) < 3_000_000


def test_figures_are_written_as_svg_and_pdf_and_nothing_is_left_half_written(study: Path, page: str) -> None:
    for name in ("perplexity", "loss"):
        svg = ElementTree.fromstring((study / "figures" / f"{name}.svg").read_text(encoding="utf-8"))
        assert int(svg.attrib["width"]) <= 900
        assert (study / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not [file for file in study.rglob(".*") if file.is_file()]
    drawn = (study / "figures" / "perplexity.svg").read_text(encoding="utf-8")
    assert "non-overlapping" in drawn
    assert "sliding(stride=16)" in drawn
    assert "sinusoidal ↑ 600" in drawn


def test_a_scheme_has_one_colour_in_every_figure(page: str) -> None:
    scales = [
        layer["encoding"]["color"]["scale"]
        for chart in Reader(page).charts()
        for layer in chart["layer"]
        if "color" in layer.get("encoding", {})
    ]
    assert len(scales) > 10
    assert all(scale == scales[0] for scale in scales)
    for name, colour in zip(scales[0]["domain"], scales[0]["range"], strict=True):
        if name == "kerple":
            assert colour in _line(page, name)


def test_colours_do_not_depend_on_the_order_of_runs() -> None:
    schemes = {f"s{index:02}": f"s{index:02}" for index in range(13)}
    chosen = figures.looks(schemes)
    assert chosen == figures.looks(dict(reversed(schemes.items())))
    assert len({(look.colour, look.shape, look.dash) for look in chosen.values()}) == 13
    assert len({look.colour for look in list(chosen.values())[:10]}) == 10


def test_one_scheme_of_two_folders_has_one_colour_and_two_dashes() -> None:
    both = figures.looks({"rope · A": "rope", "rope · B": "rope", "alibi": "alibi"})
    assert both["rope · A"].colour == both["rope · B"].colour != both["alibi"].colour
    assert both["rope · A"].dash != both["rope · B"].dash
    assert both["rope · A"].shape != both["rope · B"].shape


SIGHTS = {  # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_every_two_colours_stay_apart_for_every_sight(sight: str) -> None:
    channels = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in figures.COLOURS]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(SIGHTS[sight]).T, 0, 1)
    cones = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    opponents = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    oklab = np.cbrt(seen @ np.array(cones).T) @ np.array(opponents).T
    assert min(np.linalg.norm(one - other) for one, other in combinations(oklab, 2)) > 0.089


def test_a_line_is_the_geometric_mean_and_its_band_the_range_of_seeds(page: str) -> None:
    chart = next(chart for chart in Reader(page).charts() if chart.get("title") == "non-overlapping")
    point = next(point for point in marks(chart, "line") if point["series"] == "alibi" and point["length"] == 256)
    assert point["value"] == pytest.approx(math.sqrt(4.4 * 5.2))
    assert (point["low"], point["high"]) == (4.4, 5.2)
    assert point["seeds"] == "0: 4.40000, 1: 5.20000"


def test_a_curve_that_explodes_leaves_the_frame_with_an_arrow_and_a_number(page: str) -> None:
    chart = next(chart for chart in Reader(page).charts() if chart.get("title") == "non-overlapping")
    top = next(layer for layer in chart["layer"] if layer["mark"]["type"] == "line")["encoding"]["y"]["scale"][
        "domain"
    ][1]
    assert 6 < top < 60
    arrow = next(point for point in marks(chart, "point") if point["series"] == "sinusoidal" and "beyond" in point)
    assert arrow["value"] == top
    assert 64 < arrow["length"] < 128
    assert arrow["beyond"] == "60.0000 at 128, 600.000 at 256"


def test_every_charted_number_is_finite(page: str) -> None:
    for chart in Reader(page).charts():
        json.dumps(chart, allow_nan=False)
    lost = [
        p for chart in Reader(page).charts() for p in marks(chart, "point") if p["series"] == NASTY and "beyond" in p
    ]
    assert [point["beyond"] for point in lost] == ["NaN", "NaN"]  # one a protocol


def test_a_lone_curve_is_shown_whole_even_if_it_explodes() -> None:
    rows = [_row("sinusoidal", length, value) for length, value in EXPLODES.items()]
    low, high = _frame(rows)
    assert low < 6 < 600 < high


def test_one_length_is_enough() -> None:
    (chart,) = figures.perplexity([_row("alibi", 64, 5.0)], figures.looks({"alibi": "alibi"}))
    assert figures.specification(chart)["layer"]


def _row(scheme: str, length: int, value: float) -> dict:
    about = {"scheme": scheme, "series": scheme, "seed": 0, "context": 64, "unit": "byte", "protocol": "sliding"}
    return {**about, "metric": "perplexity", "length": length, "value": value, "count": 9}


def _frame(rows: list[dict]) -> tuple[float, float]:
    (chart,) = figures.perplexity(rows, figures.looks({row["series"]: row["scheme"] for row in rows}))
    lines = next(each for each in figures.specification(chart)["layer"] if each["mark"]["type"] == "line")
    low, high = lines["encoding"]["y"]["scale"]["domain"]
    return low, high


def test_labels_are_moved_apart_as_little_as_possible() -> None:
    assert figures.spread([10.0, 50.0, 90.0], 14.0, 0.0, 100.0) == [10, 50, 90]
    assert figures.spread([50.0, 50.0, 50.0], 10.0, 0.0, 100.0) == [40, 50, 60]
    assert figures.spread([0.0, 0.0, 99.0, 100.0], 10.0, 0.0, 100.0) == [0, 10, 90, 100]
    crowded = figures.spread([5.0] * 30, 14.0, 0.0, 100.0)
    assert crowded[0] == 0 and crowded[-1] == pytest.approx(100)


def test_thinning_keeps_every_spike() -> None:
    losses = [1.0] * 10_000
    losses[1234], losses[7777] = 9.0, 0.1
    kept = figures.thin(losses, 100)
    assert len(kept) <= 100
    assert {1234, 7777} <= set(kept)
    assert figures.thin(losses[:50], 100) == list(range(50))


def test_a_long_log_is_drawn_with_few_points() -> None:
    history = {
        "series": "alibi",
        "run": "a",
        "update": list(range(1, 5001)),
        "loss": [3.0 + u % 7 for u in range(5000)],
    }
    (chart,) = figures.loss([history], figures.looks({"alibi": "alibi"}))
    raw, smooth = (figures.specification(chart)["layer"][place]["data"]["values"][0] for place in (0, 1))
    assert len(raw["loss"]) <= figures.POINTS
    assert set(smooth["smooth"][5:-5]) == {6.0}  # the median of 3 … 9


@pytest.mark.parametrize(
    ("low", "high"), [(4.5, 15.0), (5.0, 5.6), (3.0, 900.0), (1.001, 1.01), (2.0, 2e6), (3.0, 1e300)]
)
def test_an_axis_has_a_handful_of_ticks_inside_its_range(low: float, high: float) -> None:
    found = figures.ticks(low, high)
    assert 3 <= len(found) <= 10
    assert all(low <= tick <= high for tick in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5.1234, "5.12"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (1.26e8, "1.26e8"),
        (1e300, "1.00e300"),
        (math.inf, "∞"),
        (math.nan, "NaN"),
    ],
)
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert figures.readable(value) == text


def test_seeds_share_a_curve(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"alibi-s{seed}", seed=seed, perplexities=FLAT)
    assert name_series(collect([tmp_path])) == ["alibi", "alibi"]


def test_one_scheme_and_seed_of_two_studies_are_told_apart(tmp_path: Path) -> None:
    for name in ("A", "B"):
        make_run(tmp_path / name / "alibi-s0", perplexities=FLAT)
    make_run(tmp_path / "B" / "rope-s0", "rope", perplexities=FLAT)
    assert name_series(collect([tmp_path / "A", tmp_path / "B"])) == ["alibi · A", "alibi · B", "rope"]


def test_runs_with_other_settings_are_not_taken_for_seeds(tmp_path: Path) -> None:
    make_run(tmp_path / "small", seed=0, width=32, perplexities=FLAT)
    make_run(tmp_path / "large", seed=1, width=64, perplexities=FLAT)
    assert name_series(collect([tmp_path])) == ["alibi · large", "alibi · small"]


def test_a_folder_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    make_run(tmp_path / "alibi-s0", perplexities=FLAT)
    assert len(collect([tmp_path, tmp_path / "alibi-s0", tmp_path])) == 1


def test_gathered_rows_alone_are_enough(study: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text((study / "rows.jsonl").read_text())
    schemes = [record.scheme for record in collect([tmp_path])]
    assert sorted(schemes) == sorted(["alibi", "alibi", "kerple", "sinusoidal", NASTY])


def test_what_cannot_be_compared_shares_no_axis(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "alibi", perplexities=FLAT, data="one@1")
    make_run(tmp_path / "b", "alibi", perplexities={64: 20.0}, data="two@2")
    make_run(tmp_path / "c", "rope", data="two@2")
    page = Reader(write_report([tmp_path], tmp_path / "elsewhere" / "both.html").read_text(encoding="utf-8"))
    assert "one@1, trained at 64 tokens, perplexity per byte" in page.text
    assert "two@2, trained at 64 tokens, perplexity per byte" in page.text
    curves = [{point["value"] for point in marks(chart, "line") if "value" in point} for chart in page.charts()]
    assert [values for values in curves if values] == [{5.0}, {5.0}, {20.0}, {20.0}]
    logged = [{curve["series"] for curve in marks(chart, "line") if "smooth" in curve} for chart in page.charts()]
    assert [series for series in logged if series] == [{"alibi"}, {"alibi", "rope"}]
    assert (tmp_path / "elsewhere" / "figures" / "perplexity.svg").exists()


def test_the_measurement_that_scored_most_is_taken(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", perplexities={64: 5.0})
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    fewer = [{**line, "count": 7, "value": 99.0} for line in lines if line["metric"] == "perplexity"]
    with (folder / "rows.jsonl").open("a") as rows:
        rows.write("\n".join(map(json.dumps, fewer)))
    assert {row["value"] for row in collect([folder])[0].measured} == {5.0}


def test_a_half_written_last_line_is_passed_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", perplexities=FLAT)
    with (folder / "rows.jsonl").open("a") as rows:
        rows.write('{"run": "a", "sch')
    assert len(collect([folder])[0].measured) == 6


def test_a_broken_line_is_told_with_its_file_and_number(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", perplexities=FLAT)
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join([*lines[:2], lines[2][:-5], *lines[3:]]))
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3"):
        write_report([folder])
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("length", None, "'length' is missing; it must be a whole number"),
        ("seed", "zero", "'seed' is 'zero'; it must be a whole number"),
        ("value", "much", "'value' is 'much'; it must be a number"),
    ],
)
def test_a_line_that_is_no_row_is_told(tmp_path: Path, key: str, value: str | None, reason: str) -> None:
    folder = make_run(tmp_path / "a", perplexities=FLAT)
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    lines[3] = {name: each for name, each in {**lines[3], key: value}.items() if each is not None}
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=f"line 4, is not a row: {reason}"):
        collect([folder])


def test_rows_of_unknown_metrics_are_ignored(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", perplexities=FLAT)
    with (folder / "rows.jsonl").open("a") as rows:
        rows.write('{"metric": "sink_mass", "layer": 3}\n')
    assert len(collect([folder])[0].rows) == 15


def test_folders_without_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="There are no runs in"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="nothing to report"):
        write_report([])


def test_a_page_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", perplexities={64: 5.0})
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([folder], tmp_path / "file" / "report.html")


def test_runs_without_any_measurement_still_make_a_page(tmp_path: Path) -> None:
    page = Reader(write_report([make_run(tmp_path / "a")]).read_text(encoding="utf-8"))
    assert "a (alibi, seed 0): not measured, 30 of 30 updates are logged." in page.text
    assert len(page.charts()) == 1


def test_the_report_is_imported_without_altair() -> None:
    code = "import sys, lookfar.study.report; print({'altair', 'vl_convert', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def measured(folder, seed=0, **more):
    """A run with rows in other units, with intervals, and by place in the window."""
    make_run(folder, "alibi", seed, {64: 5.0, 128: 6.0})
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    kept = [row for row in lines if row["metric"] != "bits_per_byte"]
    for row in [row for row in kept if row["metric"] == "perplexity"]:
        row |= {"low": row["value"] - 1, "high": row["value"] + 2, "documents": 9}
        kept.append({**row, "metric": "bits_per_byte", "value": math.log2(row["value"]) + seed})
        kept.append({**row, "metric": "word_perplexity", "value": 12.5 * row["value"]})
        if row["protocol"] == "non_overlapping":
            stretches = [(1, 1), (2, 2), (3, 4), (65, 128)]
            kept += [
                {**row, "metric": "loss_at", "value": 3.0 - last / 100, "count": 9 * last, "of": 9}
                | {"from": first, "to": last}
                for first, last in stretches
            ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    return folder


def values_of(specification, field):
    """All that is drawn under a field."""
    return [
        row[field]
        for layer in specification["layer"]
        for row in layer.get("data", {}).get("values", [])
        if row.get(field) is not None
    ]


def drawn_on(page):
    return [
        json.loads(each) for each in re.findall(r'<script type="application/json">(.*?)</script>', page.read_text())
    ]


def test_the_page_shows_other_units_where_rows_have_them(tmp_path):
    page = write_report([measured(tmp_path / "s0")])
    text = page.read_text()
    details = text.partition("<details>")[2].partition("</details>")[0]
    assert "bits per byte, non-overlapping" in details and "perplexity per word, sliding" in details
    assert ">2.32<" in details and ">62.5<" in details  # at the trained length
    for each in tmp_path.glob("s0/rows.jsonl"):
        lines = [line for line in each.read_text().splitlines() if '"word_' not in line and '"bits_' not in line]
        each.write_text("\n".join(lines) + "\n")
    assert "<details>" not in write_report([tmp_path / "s0"]).read_text()


def test_a_single_seed_has_its_interval_over_documents_and_several_tell_theirs(tmp_path):
    page = write_report([measured(tmp_path / "one" / "s0")])
    panel = drawn_on(page)[0]
    assert {4.0, 5.0} == set(values_of(panel, "least")) and {7.0, 8.0} == set(values_of(panel, "most"))
    assert "0: 4.000 to 7.000" in values_of(panel, "documents")
    measured(tmp_path / "two" / "s0")
    measured(tmp_path / "two" / "s1", seed=1)
    panel = drawn_on(write_report([tmp_path / "two"]))[0]
    assert not values_of(panel, "least")
    assert "0: 4.000 to 7.000, 1: 4.000 to 7.000" in values_of(panel, "documents")


def test_the_loss_by_place_is_drawn_at_the_longest_length(tmp_path):
    page = write_report([measured(tmp_path / "s0")])
    (panel,) = [each for each in drawn_on(page) if "128 tokens" in str(each.get("title"))]
    assert panel["title"] == "non-overlapping, 128 tokens"
    assert {1, 2, 4, 128} <= set(values_of(panel, "to")) and "65 to 128" in values_of(panel, "place")
    assert (page.parent / "figures" / "by_position.svg").stat().st_size > 1000


def test_what_few_windows_score_is_not_drawn_by_place():
    about = {
        "series": "rope",
        "metric": "loss_at",
        "protocol": "sliding",
        "length": 8,
        "context": 8,
        "unit": "byte",
        "seed": 0,
    }
    rows = [
        {**about, "from": 1, "to": 1, "value": 2.0, "count": 7},
        {**about, "from": 2, "to": 2, "value": 1.0, "count": 8},
    ]
    rows += [{**about, "from": 5, "to": 8, "value": 1.5, "count": 40}]
    (chart,) = by_position(rows, figures.looks({"rope": "rope"}))
    assert {row["to"] for layer in chart.to_dict(validate=False)["layer"] for row in layer["data"]["values"]} == {2, 8}
    assert not by_position(rows[1:2], figures.looks({"rope": "rope"}))
