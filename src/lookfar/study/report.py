"""Draws runs as one page that works offline, and as figures for a paper; reads their folders and nothing else."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from string import Template
from typing import Any

from lookfar.config import read_toml
from lookfar.errors import UserError

Row = Mapping[str, Any]
Group = tuple[str, int, str]  # data, trained length and unit: only what shares them can be compared

KEYS = {
    "scheme": str,
    "seed": int,
    "data": str,
    "protocol": str,
    "length": int,
    "count": int,
    "context": int,
    "unit": str,
}
METRICS = ("perplexity", "parameters", "tokens_per_second", "training_seconds")
PROTOCOLS = {
    "non_overlapping": "The stream is cut into consecutive blocks of the length; every token but the stream’s first is "
    "scored once, from scratch in each block.",
    "sliding": "Windows of the length move by a stride, half the length unless it is stated; each scores only the tokens "
    "that no earlier window scored, so every token outside the first window sees at least length − stride tokens.",
}


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds."""

    folder: Path
    source: Path  # the folder that was named: this one, or the study around it
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    losses: Mapping[int, float]  # by update
    remarks: Sequence[str]

    @property
    def scheme(self) -> str:
        """The scheme as the rows have it, or the settings where there are no rows."""
        if self.rows:
            return self.rows[0]["scheme"]
        stated = self.setting("model", "scheme") or self.folder.name
        return stated if isinstance(stated, str) else ", ".join(stated)

    @property
    def seed(self) -> int | None:
        """The seed as the rows have it, or the settings where there are no rows."""
        return self.rows[0]["seed"] if self.rows else self.setting("training", "seed")

    def setting(self, section: str, key: str) -> Any:
        """A setting of `run.toml`, or None."""
        return self.settings.get(section, {}).get(key)


@dataclass(frozen=True)
class Part:
    """What can be compared: rows that share a group, and the runs that were trained there."""

    group: Group
    runs: Sequence[Run]
    rows: Sequence[Row]  # with `series`, the name of their curve
    histories: Sequence[Row]  # `series`, `run`, `update` and `loss`


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write `report.html`, and `figures/*.svg` and `*.pdf` beside it, and return the path of the page.

    The folders are runs and studies in any mixture; the page goes into the first of them unless `output` names a file.
    A folder without runs and a broken line of `rows.jsonl` are a `UserError`; a run without rows is listed on the page.
    """
    import vl_convert

    from lookfar.study import figures  # late, as vl_convert: `lookfar --help` has no time for altair

    runs = collect(folders)
    names = name_series(runs)
    parts = _parts(runs, names)
    looks = figures.looks({name: run.scheme for name, run in zip(names, runs, strict=True)})
    panels = [figures.perplexity(part.rows, looks) for part in parts]
    losses = [figures.loss(part.histories, looks) for part in parts]
    titles = [_title(part.group) if len(parts) > 1 else "" for part in parts]
    sheets = {
        "perplexity": [(title, each) for title, each in zip(titles, panels, strict=True) if each],
        "loss": [(title, [each]) for title, each in zip(titles, losses, strict=True) if each is not None],
    }

    page = output or folders[0] / "report.html"
    contents: dict[Path, bytes] = {}
    for name, groups in sheets.items():
        if groups:
            svg = vl_convert.vegalite_to_svg(figures.sheet(groups, names), vl_version=_vega_lite())
            contents[page.parent / "figures" / f"{name}.svg"] = svg.encode()
            contents[page.parent / "figures" / f"{name}.pdf"] = vl_convert.svg_to_pdf(svg)
    charts: list[Any] = []
    body = [_head(runs, parts), _legend(looks)]
    for part, title, of_part, of_loss in zip(parts, titles, panels, losses, strict=True):
        places = [len(charts) + index for index in range(len(of_part) + (of_loss is not None))]
        charts += [figures.interactive(chart) for chart in (*of_part, of_loss) if chart is not None]
        body.append(_section(part, title, looks, places[: len(of_part)], places[len(of_part) :]))
    contents[page] = _page(body, charts, _study_title(runs)).encode()
    for path, content in contents.items():
        _publish(path, content)
    return page


def collect(folders: Sequence[Path]) -> list[Run]:
    """The runs in folders that are a run or hold some, each once, in the order of the folders and of their names."""
    runs: dict[Path, Run] = {}
    for source in map(Path, folders):
        if not source.is_dir():
            raise UserError(f"There is no folder {source}.")
        found = [source] if _is_run(source) else [folder for folder in sorted(source.iterdir()) if _is_run(folder)]
        if not found:
            raise UserError(f"There are no runs in {source}: neither it nor a folder in it has run.toml or rows.jsonl.")
        for folder in found:
            runs.setdefault(folder.resolve(), _read(folder, source))
    if not runs:
        raise UserError("There is nothing to report; name the folder of a run or a study.")
    return list(runs.values())


def name_series(runs: Sequence[Run]) -> list[str]:
    """Name the curve of every run: its scheme, and its folder too where schemes would be taken for each other.

    Runs become one curve, with a band over seeds, only if nothing but the seed tells them apart.
    """
    names = [run.scheme for run in runs]
    for finer in (
        [run.source.resolve().name for run in runs],
        [run.folder.resolve().name for run in runs],
        [str(run.folder) for run in runs],
    ):
        pairs = combinations(range(len(runs)), 2)
        mixed = {names[a] for a, b in pairs if names[a] == names[b] and not _differ_by_seed(runs[a], runs[b])}
        names = [
            f"{run.scheme} · {place}" if name in mixed else name
            for run, name, place in zip(runs, names, finer, strict=True)
        ]
    return names


def _differ_by_seed(one: Run, other: Run) -> bool:
    apart = {("model", "device"), ("data", "cache"), ("training", "seed"), ("training", "keep")}
    sections = ("model", "data", "training")
    settings = [
        {(name, key): value for name in sections for key, value in run.settings.get(name, {}).items()}
        for run in (one, other)
    ]
    same = all(
        settings[0].get(key) == settings[1].get(key) for key in (settings[0].keys() | settings[1].keys()) - apart
    )
    groups = [{_group(row) for row in run.rows} for run in (one, other)]
    comparable = not (groups[0] and groups[1]) or groups[0] & groups[1]
    return not comparable or (same and one.seed != other.seed)


def _is_run(folder: Path) -> bool:
    return (folder / "run.toml").is_file() or (folder / "rows.jsonl").is_file()


def _read(folder: Path, source: Path) -> Run:
    settings = read_toml(folder / "run.toml") if (folder / "run.toml").is_file() else {}
    rows, remarks = _read_rows(folder / "rows.jsonl")
    losses, more = _read_log(folder / "log.jsonl")
    return Run(folder, source, settings, rows, losses, [*remarks, *more])


def _read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """The rows of known metrics, of equal ones the last; a last line that is cut off is left out and told."""
    rows: dict[tuple[Any, ...], Row] = {}
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # bytes that are not UTF-8 too
            if number == len(lines):
                return list(rows.values()), ["the last line of its rows is cut off and was left out"]
            raise UserError(f"{path}, line {number} is not JSON; remove the line or measure the run again.") from error
        if not isinstance(row, dict) or "metric" not in row:
            raise UserError(f"{path}, line {number} is not a row: it has no 'metric'.")
        if row["metric"] in METRICS:
            row = _checked(row, f"{path}, line {number}")
            rows[*(row[key] for key in ("metric", "protocol", "length")), _group(row)] = row
    return list(rows.values()), []


def _checked(row: dict[str, Any], place: str) -> Row:
    for key, kind in KEYS.items():
        if not isinstance(row.get(key), kind):
            stated = f"{key!r} is {row[key]!r}" if key in row else f"{key!r} is missing"
            raise UserError(
                f"{place} is not a row: {stated}, it must be {'text' if kind is str else 'a whole number'}."
            )
    try:
        return {**row, "value": math.nan if row["value"] is None else float(row["value"])}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place} is not a row: 'value' is {row.get('value')!r}, it must be a number.") from error


def _read_log(path: Path) -> tuple[dict[int, float], list[str]]:
    """The loss of every update, of a repeated one the last; what is cut off or is no update is passed over."""
    losses: dict[int, float] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            losses[int(entry["update"])] = float(entry["loss"])
        except (ValueError, KeyError, TypeError):
            continue
    wrong = sum(not math.isfinite(loss) for loss in losses.values())
    return dict(sorted(losses.items())), [f"{wrong} of its training losses are not finite"] if wrong else []


def _group(row: Row) -> Group:
    return row["data"], row["context"], row["unit"]


def _parts(runs: Sequence[Run], names: Sequence[str]) -> list[Part]:
    homes = [_home(run, runs) for run in runs]
    groups = dict.fromkeys([*homes, *(_group(row) for run in runs for row in run.rows)])
    return [
        Part(
            group,
            [run for run in runs if any(_group(row) == group for row in run.rows)],
            [
                {**row, "series": name}
                for run, name in zip(runs, names, strict=True)
                for row in run.rows
                if _group(row) == group
            ],
            [
                {"series": name, "run": str(run.folder), "update": list(run.losses), "loss": list(run.losses.values())}
                for run, name, home in zip(runs, names, homes, strict=True)
                if home == group
            ],
        )
        for group in groups
    ]


def _home(run: Run, runs: Sequence[Run]) -> Group:
    """The group in which a run was trained; one without rows goes to a run with the same data and trained length."""
    if run.rows:
        return _group(next((row for row in run.rows if row["protocol"] == "training"), run.rows[0]))
    for other in runs:
        alike = other.settings.get("data") == run.settings.get("data")
        if other.rows and alike and other.setting("model", "context") == run.setting("model", "context"):
            return _home(other, runs)
    return str(run.setting("data", "source") or "data unknown"), run.setting("model", "context") or 0, "token"


def _title(group: Group) -> str:
    data, context, unit = group
    return f"{data}, trained at {context:,} {unit}s"


def _study_title(runs: Sequence[Run]) -> str:
    studies = dict.fromkeys(run.source / "study.toml" for run in runs if (run.source / "study.toml").is_file())
    titles = dict.fromkeys(str(read_toml(path).get("study", {}).get("title", "")) for path in studies)
    return " · ".join(filter(None, titles)) or "Train short, test long"


def _head(runs: Sequence[Run], parts: Sequence[Part]) -> str:
    rows = [row for run in runs for row in run.rows if row["metric"] == "perplexity"]
    lead = f"{_counted(len({run.scheme for run in runs}), 'scheme')} in {_counted(len(runs), 'run')}"
    if rows:
        reach = max(rows, key=lambda row: row["length"] / row["context"])
        contexts = _either(sorted({part.group[1] for part in parts}))
        lead += f", trained at {contexts} tokens and measured up to {reach['length']:,}: "
        lead += f"{reach['length'] / reach['context']:.3g} times as far."
    protocols = "".join(
        f"<dt>{escape(protocol)}</dt><dd>{PROTOCOLS[protocol.partition('(')[0]]}</dd>"
        for protocol in sorted({row["protocol"] for row in rows})
        if protocol.partition("(")[0] in PROTOCOLS
    )
    facts = _facts(parts[0]) if len(parts) == 1 else ""
    head = f'<h1>{escape(_study_title(runs))}</h1>\n<p class="lead">{lead}</p>\n'
    return head + f'<dl class="facts">{facts}{protocols}</dl>\n' + _remarks(runs)


def _facts(part: Part) -> str:
    """What was trained, from the settings of the runs; several values stand side by side."""

    def stated(section: str, key: str, text: str = "{}") -> str:
        values = [run.setting(section, key) for run in part.runs]
        each = _either(sorted({value for value in values if value is not None}))
        return text.format(each) if each else ""

    data, context, unit = part.group
    sizes = sorted({row["value"] for row in part.rows if row["metric"] == "parameters"})
    sizes = _either([f"{size / 1e6:,.2f}" for size in sizes[:: max(1, len(sizes) - 1)]], " to ")
    batches = stated("training", "batch", "batches of {} sequences") or "sequences"
    seeds = sorted({run.seed for run in part.runs if run.seed is not None})
    facts = {
        "Model": [
            stated("model", "layers", "{} layers"),
            stated("model", "width", "width {}"),
            stated("model", "heads", "{} heads"),
            sizes and f"{sizes} million parameters",
        ],
        "Data": [data, f"scored per {unit}", stated("data", "tokenizer", "{} as tokens")],
        "Training": [
            stated("training", "updates", "{} updates"),
            f"{batches} of {context:,} tokens",
            stated("training", "optimizer"),
            stated("training", "rate", "peak rate {}"),
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else "",
        ],
    }
    return "".join(f"<dt>{term}</dt><dd>{escape(', '.join(filter(None, each)))}</dd>" for term, each in facts.items())


def _remarks(runs: Sequence[Run]) -> str:
    """What is missing: runs that were not measured, runs of a study that never began, what was wrong in a folder."""
    lines = []
    for run in runs:
        about = [*run.remarks]
        if not any(row["metric"] == "perplexity" for row in run.rows):
            planned = run.setting("training", "updates")
            done = f"{max(run.losses, default=0):,}" + (f" of {planned:,}" if planned else "")
            about.insert(0, f"not measured, {done} updates are logged")
        seed = "" if run.seed is None else f", seed {run.seed}"
        lines += [f"{run.folder.name} ({run.scheme}{seed}): {remark}." for remark in about]
    known = {(_plain(name), run.seed) for run in runs for name in (run.scheme, run.setting("model", "scheme"))}
    for source in dict.fromkeys(run.source for run in runs):
        study = read_toml(source / "study.toml").get("study", {}) if (source / "study.toml").is_file() else {}
        planned = [(scheme, seed) for scheme in study.get("schemes", []) for seed in study.get("seeds", [0])]
        missing = [(scheme, seed) for scheme, seed in planned if (_plain(scheme), seed) not in known]
        lines += [f"{scheme}, seed {seed}: not begun." for scheme, seed in missing]
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<aside class="remarks"><p>Not complete</p><ul>{listed}</ul></aside>\n' if lines else ""


def _plain(scheme: Any) -> str:
    return "".join(str(scheme).split())


def _legend(looks: Mapping[str, Any]) -> str:
    keys = "".join(
        f'<button type="button" data-series="{escape(name)}" aria-pressed="true">{_swatch(look)}{escape(name)}</button>'
        for name, look in looks.items()
    )
    hint = '<span class="hint">click: hide or show · shift-click: only this one</span>'
    all_of_them = '<button type="button" class="all" hidden>show all</button>'
    return f'<nav class="legend" aria-label="Schemes">{keys}{all_of_them}{hint}</nav>\n'


def _swatch(look: Any) -> str:
    dash = "" if look.dash[-1] == 0 else f' stroke-dasharray="{" ".join(map(str, look.dash))}"'
    return (
        f'<svg class="swatch" viewBox="-14 -6 28 12" aria-hidden="true">'
        f'<path d="M-14,0H14" stroke="{look.colour}" stroke-width="2"{dash}/>'
        f'<path d="{look.shape}" transform="scale(4)" fill="{look.colour}"/></svg>'
    )


def _section(part: Part, title: str, looks: Mapping[str, Any], panels: Sequence[int], losses: Sequence[int]) -> str:
    seeds = len({row["seed"] for row in part.rows}) > 1
    lines = "the geometric mean over seeds, its band runs from the lowest seed to the highest" if seeds else "one run"
    parts = [f'<h2>{escape(title)}</h2>\n<dl class="facts">{_facts(part)}</dl>'] if title else []
    if panels:
        caption = (
            f"<b>Perplexity against length.</b> Each line is {lines}. The dashed rule marks the trained length, "
            f"{part.group[1]:,} tokens. A curve that leaves the frame ends in an arrow and has its last value beside its "
            "name; × stands where a value is not a number. Both axes are logarithmic."
        )
        parts.append(_figure(panels, caption, "perplexity"))
        parts.append(_table(part.rows, looks))
    if losses:
        caption = (
            "<b>Training loss.</b> Faint: the loss of each run, thinned to the lowest and the highest of every stretch. "
            "Bold: the running median over a twentieth of the updates, all seeds of a scheme together. "
            "The steep first tenth may leave the frame."
        )
        parts.append(_figure(losses, caption, "loss"))
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _figure(charts: Sequence[int], caption: str, name: str) -> str:
    places = "".join(f'<div class="chart" data-chart="{chart}"></div>' for chart in charts)
    links = " ".join(f'<a href="figures/{name}.{kind}">{kind.upper()}</a>' for kind in ("svg", "pdf"))
    return f'<figure><div class="panels">{places}</div><figcaption>{caption} {links}</figcaption></figure>'


@dataclass(frozen=True)
class _Column:
    head: str
    note: str
    values: Mapping[str, Sequence[float]]  # by series, one a seed
    show: Callable[[Sequence[float]], str]
    best: Callable[[Iterable[float]], float] | None = None
    foot: str = ""


def _table(rows: Sequence[Row], looks: Mapping[str, Any]) -> str:
    """A line for each series, a column for each number; what is best of a column is bold."""
    protocols = _columns(rows)
    columns = [column for each in protocols.values() for column in each]
    spans = "".join(
        f'<th class="span" colspan="{len(e)}"><span>{escape(n)}</span></th>' for n, e in protocols.items() if n
    )
    heads = "".join(
        f'<th scope="col" data-column="{place}"><button type="button"><span>{escape(column.head)}</span>'
        f"{f'<small>{escape(column.note)}</small>' if column.note else ''}</button></th>"
        for place, column in enumerate([_Column("scheme", "", {}, str), *columns])
    )
    cells = [_cells(column) for column in columns]
    series = [name for name in looks if any(name in column.values for column in columns)]
    body = "".join(
        f'<tr data-series="{escape(name)}"><td data-value="{escape(name)}">{_swatch(looks[name])} {escape(name)}</td>'
        f"{''.join(of_column.get(name, '<td data-value="">–</td>') for of_column in cells)}</tr>\n"
        for name in series
    )
    foot = "".join(f"<td>{column.foot}</td>" for column in columns)
    caption = (
        "<b>Numbers.</b> Perplexity is the mean ± standard deviation over seeds, the best of a column is bold; lengths are "
        "multiples of the trained one. Speed and time are of training. A click on a head sorts."
    )
    return (
        f'<figure><div class="scroll"><table><thead><tr><td colspan="{1 + len(protocols[""])}"></td>{spans}</tr>\n'
        f"<tr>{heads}</tr></thead>\n<tbody>{body}</tbody>\n<tfoot><tr><td>tokens scored</td>{foot}</tr></tfoot></table></div>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _columns(rows: Sequence[Row]) -> dict[str, list[_Column]]:
    """The columns of the table under their protocol; those about the training stand under no name."""
    from lookfar.study.figures import readable

    def values(metric: str, protocol: str | None = None, length: int | None = None) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for row in rows:
            if row["metric"] == metric and protocol in (None, row["protocol"]) and length in (None, row["length"]):
                found.setdefault(row["series"], []).append(row["value"])
        return found

    measured = [row for row in rows if row["metric"] == "perplexity"]
    seeds = {name: [len({row["seed"] for row in measured if row["series"] == name})] for name in values("perplexity")}
    columns = {
        "": [
            _Column("seeds", "", seeds, lambda each: f"{each[0]}"),
            _Column("parameters", "millions", values("parameters"), lambda each: f"{fmean(each) / 1e6:,.3f}"),
            _Column("speed", "tokens/s", values("tokens_per_second"), lambda each: f"{fmean(each):,.0f}", max),
            _Column("time", "", values("training_seconds"), lambda each: _duration(fmean(each)), min),
        ]
    }
    for protocol in sorted({row["protocol"] for row in measured}):
        of_protocol = [row for row in measured if row["protocol"] == protocol]
        columns[f"perplexity, {protocol.replace('_', '-')}"] = [
            _Column(
                f"{length / of_protocol[0]['context']:.3g}×",
                f"{length:,}",
                values("perplexity", protocol, length),
                lambda each: _mean_and_deviation(each, readable),
                min,
                _span(sorted({row["count"] for row in of_protocol if row["length"] == length})),
            )
            for length in _lengths(of_protocol)
        ]
    return columns


def _lengths(rows: Sequence[Row]) -> list[int]:
    """The measured lengths that are the trained one doubled some times; all where there are none."""
    lengths = sorted({row["length"] for row in rows})
    return [length for length in lengths if math.log2(length / rows[0]["context"]).is_integer()] or lengths


def _cells(column: _Column) -> dict[str, str]:
    means = {name: fmean(each) for name, each in column.values.items()}
    finite = [mean for mean in means.values() if math.isfinite(mean)]
    shown = {name: column.show(each) for name, each in column.values.items()}
    best = column.best(finite) if column.best and len(means) > 1 and finite else None
    cells = {}
    for name, mean in means.items():
        text = f"<b>{shown[name]}</b>" if mean == best else shown[name]
        exact = ", ".join(f"{value:.6g}" for value in column.values[name])
        cells[name] = f'<td data-value="{mean if math.isfinite(mean) else ""}" title="{exact}">{text}</td>'
    return cells


def _mean_and_deviation(values: Sequence[float], readable: Callable[[float], str]) -> str:
    mean = readable(fmean(values))
    if len(values) == 1 or not math.isfinite(fmean(values)):
        return mean
    decimals = len(mean.partition(".")[2])
    return f'{mean}<span class="std"> ± {stdev(values):,.{decimals}f}</span>'


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _span(counts: Sequence[int]) -> str:
    return f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,}–{counts[-1]:,}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _either(values: Iterable[Any], word: str = " or ") -> str:
    return word.join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def _page(body: Sequence[str], charts: Sequence[Any], title: str) -> str:
    template = Template(files("lookfar.study").joinpath("page.html").read_text(encoding="utf-8"))
    plain = json.dumps(charts, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.substitute(title=escape(title), body="\n".join(body), charts=plain, bundle=_bundle())


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    return vl_convert.javascript_bundle(vl_version=_vega_lite()).replace("</script", "<\\/script")


def _vega_lite() -> str:
    """The version of Vega-Lite that altair writes, as vl_convert names it."""
    import altair

    return ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def _publish(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)  # noqa: PTH105
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)
