"""Draws runs as one page that works offline, and as figures for a paper; reads their folders and nothing else."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from string import Template
from typing import Any

from lookfar import files, plugins
from lookfar.config import read_toml
from lookfar.errors import UserError

Row = Mapping[str, Any]
Group = tuple[str, int, str]  # data, trained length and unit: only what shares them can be compared

FILES = ("run.toml", "rows.jsonl", "error.txt")  # one of them makes a folder a run
METRICS = ("perplexity", "parameters", "tokens_per_second", "training_seconds")
KEYS = {"scheme": str, "seed": int, "data": str, "protocol": str, "length": int, "count": int, "context": int}
INDIFFERENT = {  # settings that leave the numbers of a run what they are
    *("training.seed", "training.checkpoint_every", "training.keep", "training.evaluate_every"),
    *("model.device", "data.cache"),
}


@dataclass(frozen=True)
class Record:
    """What is left of a run: the rows of one scheme and seed, and the log of the training."""

    folder: Path
    source: Path  # the folder that was named: this one, or the study around it
    name: str
    scheme: str
    seed: int | None
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    losses: Mapping[int, float]  # by update
    failure: str  # the last line of error.txt

    @property
    def measured(self) -> list[Row]:
        """The rows of perplexity."""
        return [row for row in self.rows if row["metric"] == "perplexity"]

    @property
    def groups(self) -> list[Group]:
        """Where its perplexities can be compared."""
        return list(dict.fromkeys((row["data"], row["context"], row["unit"]) for row in self.measured))

    def setting(self, section: str, key: str) -> Any:
        """A setting of `run.toml`, or None."""
        return self.settings.get(section, {}).get(key)


@dataclass(frozen=True)
class Part:
    """What can be compared, on one axis and in one column."""

    group: Group
    records: Sequence[Record]
    rows: Sequence[Row]  # with `series`, the name of their curve
    histories: Sequence[Row]  # `series`, `run`, `update` and `loss` of each run that was trained here

    @property
    def title(self) -> str:
        """The group in words."""
        data, context, unit = self.group
        return f"{data}, trained at {context:,} tokens, perplexity per {unit}"


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write `report.html`, and `figures/*.svg` and `*.pdf` beside it, and return the path of the page.

    The folders are runs and studies in any mixture; the page goes into the first of them unless `output` names a file.
    A run without rows is listed on the page.

    Raises:
        UserError: a folder holds no run, a line of `rows.jsonl` is broken, or the page cannot be written.
    """
    import vl_convert

    from lookfar.study import figures  # late, as vl_convert: `lookfar --help` has no time for altair

    records = collect(folders)
    names = name_series(records)
    parts = _parts(records, names)
    looks = figures.looks({name: record.scheme for name, record in zip(names, records, strict=True)})
    panels = {
        "perplexity": [list(map(figures.specification, figures.perplexity(part.rows, looks))) for part in parts],
        "loss": [list(map(figures.specification, figures.loss(part.histories, looks))) for part in parts],
    }
    page = output or Path(folders[0]) / "report.html"
    contents: dict[Path, bytes] = {}
    for name, of_parts in panels.items():
        groups = [(part.title, each) for part, each in zip(parts, of_parts, strict=True) if each]
        if groups:
            svg = vl_convert.vegalite_to_svg(figures.sheet(groups, names), vl_version=_vega_lite())
            contents[page.parent / "figures" / f"{name}.svg"] = svg.encode()
            contents[page.parent / "figures" / f"{name}.pdf"] = vl_convert.svg_to_pdf(svg)
    title = _title(records)
    sections = [
        _section(part, looks, *drawn, alone=len(parts) == 1)
        for part, *drawn in zip(parts, *panels.values(), strict=True)
    ]
    contents[page] = _page(title, looks, _head(title, records, parts), sections).encode()
    for path, content in contents.items():
        _publish(path, content)
    return page


def collect(folders: Sequence[Path]) -> list[Record]:
    """The runs in folders that are a run or hold some, each once, in the order of the folders and of their names."""
    found: dict[Path, list[Record]] = {}
    for source in map(Path, folders):
        if not source.is_dir():
            raise UserError(f"There is no folder {source}.")
        runs = list(_runs_in(source))
        if not runs:
            raise UserError(f"There are no runs in {source}: neither it nor a folder in it has run.toml or rows.jsonl.")
        for folder in runs:
            if folder.resolve() not in found:
                found[folder.resolve()] = _read(folder, source)
    if not found:
        raise UserError("There is nothing to report; name the folder of a run or of a study.")
    return [record for records in found.values() for record in records]


def name_series(records: Sequence[Record]) -> list[str]:
    """Name the curve of every run: its scheme, and its folder too where runs would be taken for each other.

    Runs share a curve, with a band over seeds, only if nothing but the seed tells them apart.
    """
    names = [record.scheme for record in records]
    for finer in (
        [record.source.resolve().name for record in records],
        [record.folder.resolve().name for record in records],
        [f"{record.folder}/{record.name}" for record in records],
    ):
        alike = [(a, b) for a, b in combinations(range(len(records)), 2) if names[a] == names[b]]
        mixed = {names[a] for a, b in alike if not _may_share(records[a], records[b])}
        names = [
            f"{record.scheme} · {place}" if name in mixed else name
            for record, name, place in zip(records, names, finer, strict=True)
        ]
    return names


def _may_share(one: Record, other: Record) -> bool:
    """Whether two runs of a scheme are seeds of one thing, or never stand on one axis."""

    def decisive(record: Record) -> dict[str, Any]:
        sections = {name: record.settings.get(name, {}) for name in ("model", "data", "training")}
        settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        return {key: value for key, value in settings.items() if key not in INDIFFERENT}

    if one.groups and other.groups and not set(one.groups) & set(other.groups):
        return True
    return one.seed != other.seed and decisive(one) == decisive(other)


def _runs_in(source: Path) -> Iterator[Path]:
    """The folder itself if it is a run; the runs in it if it is a study; it again if it only has rows."""
    if (source / "run.toml").is_file():
        yield source
        return
    inside = [folder for folder in sorted(source.iterdir()) if any((folder / file).is_file() for file in FILES)]
    yield from inside or ([source] if (source / "rows.jsonl").is_file() else [])


def _read(folder: Path, source: Path) -> list[Record]:
    """The runs of a folder: one, unless its rows have several schemes or seeds; the trained one comes first."""
    settings = read_toml(folder / "run.toml") if (folder / "run.toml").is_file() else {}
    lines = files.read_lines(folder / "log.jsonl")
    losses = {line["update"]: float(line["loss"]) for line in lines if "update" in line and "loss" in line}
    error = folder / "error.txt"
    failure = error.read_text(encoding="utf-8", errors="replace").strip() if error.is_file() else ""

    runs: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in sorted(_read_rows(folder / "rows.jsonl"), key=lambda row: row["protocol"] != "training"):
        runs.setdefault((row.get("run", folder.name), row["scheme"], row["seed"]), []).append(row)
    if not runs:
        scheme = settings.get("model", {}).get("scheme", folder.name)
        spelled = scheme if isinstance(scheme, str) else " | ".join(scheme)
        runs = {(folder.name, spelled, settings.get("training", {}).get("seed")): []}
    return [
        Record(folder, source, *run, settings, rows, {} if place else losses, failure.rpartition("\n")[2])
        for place, (run, rows) in enumerate(runs.items())
    ]


def _read_rows(path: Path) -> list[Row]:
    """The rows of known metrics; of one measurement that which scored most, of such the last."""
    kept: dict[tuple[Any, ...], Row] = {}
    for number, line in enumerate(files.read_lines(path), start=1):
        if line.get("metric") in METRICS:
            row = _checked(line, f"{path}, line {number}")
            key = tuple(row.get(name) for name in ("run", "metric", "unit", *KEYS) if name != "count")
            kept[key] = max(row, kept.get(key, row), key=lambda row: row["count"])
    return list(kept.values())


def _checked(row: dict[str, Any], place: str) -> Row:
    for key, kind in KEYS.items():
        if not isinstance(row.get(key), kind):
            stated = f"{key!r} is {row[key]!r}" if key in row else f"{key!r} is missing"
            wanted = "text" if kind is str else "a whole number"
            raise UserError(f"{place}, is not a row: {stated}; it must be {wanted}.")
    try:
        value = math.nan if row["value"] is None else float(row["value"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place}, is not a row: 'value' is {row.get('value')!r}; it must be a number.") from error
    return {"unit": "token", **row, "value": value}


def _parts(records: Sequence[Record], names: Sequence[str]) -> list[Part]:
    """The groups that runs were trained in, then those in which they were measured besides."""
    homes = [_home(record, records) for record in records]
    groups = dict.fromkeys([*homes, *(group for record in records for group in record.groups)])
    parts = []
    for group in groups:
        there, rows, histories = [], [], []
        for record, name, home in zip(records, names, homes, strict=True):
            if group in (home, *record.groups):
                there.append(record)
                about_training = [row for row in record.rows if row["metric"] != "perplexity"]
                measured = [row for row in record.measured if (row["data"], row["context"], row["unit"]) == group]
                rows += [{**row, "series": name} for row in (*about_training, *measured)]
            if group == home:
                drawn = {"update": list(record.losses), "loss": list(record.losses.values())}
                histories.append({"series": name, "run": f"{record.folder}/{record.name}", **drawn})
        parts.append(Part(group, there, rows, histories))
    return parts


def _home(record: Record, records: Sequence[Record]) -> Group:
    """The group of the data and length that a run was trained at, measured by whichever run."""
    trained = [(row["data"], row["context"]) for row in record.rows if row["protocol"] == "training"]
    trained += [(record.setting("versions", "data"), record.setting("model", "context"))]
    for group in [group for each in (record, *records) for group in each.groups]:
        if group[:2] == trained[0]:
            return group
    if record.groups:
        return record.groups[0]
    data, context = trained[0]
    return str(data or record.setting("data", "source") or "data unknown"), context or 0, "token"


def _title(records: Sequence[Record]) -> str:
    studies = [_study(source) for source in dict.fromkeys(record.source for record in records)]
    return (
        " · ".join(dict.fromkeys(str(study["title"]) for study in studies if study.get("title")))
        or "Train short, test long"
    )


def _study(source: Path) -> Mapping[str, Any]:
    return read_toml(source / "study.toml").get("study", {}) if (source / "study.toml").is_file() else {}


def _head(title: str, records: Sequence[Record], parts: Sequence[Part]) -> str:
    rows = [row for record in records for row in record.measured]
    lead = f"{_counted(len({record.scheme for record in records}), 'scheme')}, {_counted(len(records), 'run')}"
    if rows:
        contexts = _either(sorted({row["context"] for row in rows}))
        farthest = max(rows, key=lambda row: row["length"] / row["context"])
        factor = farthest["length"] / farthest["context"]
        lead += f", trained at {contexts} tokens and measured up to {farthest['length']:,}"
        lead += f": {factor:.3g} times as far." if factor > 1 else "."
    known = _words()["protocols"]
    told = [(protocol, known.get(protocol.partition("(")[0])) for protocol in sorted(_values(rows, "protocol"))]
    protocols = [(_spoken(protocol), sentence) for protocol, sentence in told if sentence]
    facts = _facts(parts[0]) if len(parts) == 1 else []
    return f'<h1>{escape(title)}</h1>\n<p class="lead">{lead}</p>\n{_list([*facts, *protocols])}\n{_remarks(records)}'


def _facts(part: Part) -> list[tuple[str, str]]:
    """What was trained, from the settings of the runs; several values stand side by side."""

    def stated(section: str, key: str, text: str = "{}") -> str:
        values = {record.setting(section, key) for record in part.records} - {None}
        return text.format(_either(sorted(values)), s="s" * (values != {1})) if values else ""

    data, context, unit = part.group
    sizes = sorted(row["value"] for row in part.rows if row["metric"] == "parameters")
    seeds = sorted({record.seed for record in part.records if record.seed is not None})
    facts = {
        "Model": [
            stated("model", "layers", "{} layer{s}"),
            stated("model", "width", "width {}"),
            stated("model", "heads", "{} head{s}"),
            _either(dict.fromkeys(f"{size / 1e6:,.3f}" for size in sizes[:1] + sizes[-1:]), " to ")
            + " million parameters" * bool(sizes),
        ],
        "Data": [data, stated("data", "tokenizer", "{} as tokens"), f"perplexity per {unit}"],
        "Training": [
            stated("training", "updates", "{} update{s}"),
            (stated("training", "batch", "batches of {} sequence{s}") or "sequences") + f" of {context:,} tokens",
            stated("training", "optimizer"),
            stated("training", "rate", "peak rate {}"),
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" * bool(seeds),
        ],
    }
    return [(term, ", ".join(filter(None, each))) for term, each in facts.items()]


def _remarks(records: Sequence[Record]) -> str:
    """What is missing: runs that failed or were not measured, and those of a study that never began."""
    lines = []
    for record in records:
        if not record.measured:
            updates, planned = max(record.losses, default=0), record.setting("training", "updates")
            done = f"{updates:,}{f' of {planned:,}' if planned else ''} updates are logged"
            seed = "" if record.seed is None else f", seed {record.seed}"
            fate = f"failed ({record.failure})" if record.failure else "not measured"
            lines.append(f"{record.name} ({record.scheme}{seed}): {fate}, {done}.")
    for source in dict.fromkeys(record.source for record in records):
        known = {(_spelled(record.scheme), record.seed) for record in records if record.source == source}
        study = _study(source)
        planned = [(scheme, seed) for scheme in study.get("schemes", []) for seed in study.get("seeds", [0])]
        lines += [
            f"{scheme}, seed {seed}: not begun." for scheme, seed in planned if (_spelled(scheme), seed) not in known
        ]
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<aside class="remarks"><p>Not complete</p><ul>{listed}</ul></aside>\n' if lines else ""


def _spelled(scheme: str) -> str:
    try:
        return " + ".join(str(term) for term in plugins.parse(scheme) if term.name != "nope")
    except UserError:  # the name of a folder, or a pattern of schemes
        return scheme


def _key(name: str, look: Any) -> str:
    shown = f"{_swatch(look)}{escape(name)}"
    return f'<button type="button" data-series="{escape(name)}" aria-pressed="true">{shown}</button>'


def _swatch(look: Any) -> str:
    dash = " ".join(map(str, look.dash)) if look.dash[-1] else "none"
    return (
        f'<svg class="swatch" viewBox="-14 -6 28 12" aria-hidden="true">'
        f'<path d="M-14,0H14" stroke="{look.colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        f'<path d="{look.shape}" transform="scale(4)" fill="{look.colour}"/></svg>'
    )


def _section(part: Part, looks: Mapping[str, Any], perplexity: Sequence[Row], loss: Sequence[Row], alone: bool) -> str:
    blocks = [] if alone else [f"<h2>{escape(part.title)}</h2>", _list(_facts(part))]
    words = _words()
    if perplexity:
        seeds = max(len(_values(rows, "seed")) for rows in _grouped(part.rows, "series").values())
        blocks.append(_figure(perplexity, words["perplexity"] + words["band"] * (seeds > 1), "perplexity"))
        blocks.append(_table(part.rows, looks))
    if loss:
        blocks.append(_figure(loss, words["loss"], "loss"))
    return "<section>\n" + "\n".join(blocks) + "\n</section>"


def _figure(panels: Sequence[Row], caption: str, name: str) -> str:
    plain = [json.dumps(panel, ensure_ascii=False, separators=(",", ":"), allow_nan=False) for panel in panels]
    safe = [text.replace("<", "\\u003c") for text in plain]  # no name ends the script
    places = "".join(f'<div class="chart"><script type="application/json">{text}</script></div>\n' for text in safe)
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
    of_protocols = _columns(rows)
    columns = [column for each in of_protocols.values() for column in each]
    spans = [
        f'<th class="span" colspan="{len(each)}"><span>{escape(name)}</span></th>'
        for name, each in of_protocols.items()
    ]
    heads = [
        f'<th scope="col" data-column="{place}"><button type="button"><span>{column.head}</span>'
        f"<small>{escape(column.note)}</small></button></th>"
        for place, column in enumerate([_Column("scheme", "", {}, str), *columns])
    ]
    cells = [_cells(column) for column in columns]
    body = [
        f'<tr data-series="{escape(name)}"><td data-value="{escape(name)}">{_swatch(look)} {escape(name)}</td>'
        + "".join(of_column.get(name, '<td data-value="">–</td>') for of_column in cells)
        + "</tr>\n"
        for name, look in looks.items()
        if any(name in column.values for column in columns)
    ]
    foot = "".join(f"<td>{column.foot}</td>" for column in columns)
    table = (
        f"<thead><tr><td></td>{''.join(spans)}</tr>\n<tr>{''.join(heads)}</tr></thead>\n"
        f"<tbody>{''.join(body)}</tbody>\n<tfoot><tr><td>tokens scored</td>{foot}</tr></tfoot>"
    )
    return (
        f'<figure><div class="scroll"><table>{table}</table></div><figcaption>{_words()["table"]}</figcaption></figure>'
    )


def _columns(rows: Sequence[Row]) -> dict[str, list[_Column]]:
    """The columns of the table under the name of their protocol."""
    from lookfar.study.figures import readable

    def mean(each: Sequence[float]) -> str:
        text = readable(fmean(each))
        if len(each) == 1 or not math.isfinite(fmean(each)):
            return text
        deviation = readable(stdev(each)) if "e" in text else f"{stdev(each):,.{len(text.partition('.')[2])}f}"
        return f'{text}<span class="std">± {deviation}</span>'

    def column(head: str, note: str, rows: Iterable[Row], *rest: Any) -> _Column:
        by_series = _grouped(rows, "series")
        return _Column(head, note, {name: [row["value"] for row in each] for name, each in by_series.items()}, *rest)

    metrics = {metric: _grouped(rows, "metric").get(metric, []) for metric in METRICS}
    seeds = {
        name: [float(len(_values(each, "seed")))] for name, each in _grouped(metrics["perplexity"], "series").items()
    }
    columns = {
        "training": [
            _Column("seeds", "", seeds, lambda each: f"{each[0]:.0f}"),
            column("parameters", "millions", metrics["parameters"], lambda each: f"{fmean(each) / 1e6:,.3f}"),
            column("speed", "tokens/s", metrics["tokens_per_second"], lambda each: f"{fmean(each):,.0f}", max),
            column("time", "", metrics["training_seconds"], lambda each: _duration(fmean(each))),
        ]
    }
    for protocol, measured in sorted(_grouped(metrics["perplexity"], "protocol").items()):
        by_length = dict(sorted(_grouped(measured, "length").items()))
        doubled = [n for n in by_length if math.log2(n / measured[0]["context"]).is_integer()] or list(by_length)
        columns[f"perplexity, {_spoken(protocol)}"] = [
            column(
                f"{length / measured[0]['context']:.3g}×",
                f"{length:,}",
                by_length[length],
                mean,
                min,
                _either(dict.fromkeys(pick(_values(by_length[length], "count")) for pick in (min, max)), "–"),
            )
            for length in doubled
        ]
    return columns


def _cells(column: _Column) -> dict[str, str]:
    means = {name: fmean(each) for name, each in column.values.items()}
    finite = [mean for mean in means.values() if math.isfinite(mean)]
    best = column.best(finite) if column.best and len(means) > 1 and finite else None
    cells = {}
    for name, mean in means.items():
        shown, exact = column.show(column.values[name]), ", ".join(f"{value:.6g}" for value in column.values[name])
        shown = f"<b>{shown}</b>" if mean == best else shown
        cells[name] = f'<td data-value="{mean if math.isfinite(mean) else ""}" title="{exact}">{shown}</td>'
    return cells


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _spoken(protocol: str) -> str:
    return protocol.replace("non_overlapping", "non-overlapping")


def _list(facts: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in facts)
    return f'<dl class="facts">{items}</dl>'


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _either(values: Iterable[Any], word: str = " or ") -> str:
    return word.join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def _values(rows: Iterable[Row], key: str) -> set[Any]:
    return {row[key] for row in rows}


def _grouped(rows: Iterable[Row], key: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _page(title: str, looks: Mapping[str, Any], head: str, sections: Sequence[str]) -> str:
    keys = "".join(_key(name, look) for name, look in looks.items())
    parts = {"title": escape(title), "head": head, "keys": keys, "sections": "\n".join(sections)}
    return Template(_resource("page.html")).substitute(parts, bundle=_bundle())


def _words() -> Mapping[str, Any]:
    return json.loads(_resource("words.json"))


def _resource(name: str) -> str:
    return resources.files("lookfar.study").joinpath(name).read_text(encoding="utf-8")


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_vega_lite())
    return script.replace("</script", "<\\/script")


def _vega_lite() -> str:
    """The version of Vega-Lite that altair writes, as vl_convert names it."""
    import altair

    return ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def _publish(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another place for the page.") from error
