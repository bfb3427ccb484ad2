"""Draws runs as one page that works offline, and as figures for a paper; reads their folders and nothing else."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lookfar import config
from lookfar.config import Study, read_toml
from lookfar.errors import UserError
from lookfar.study.lessons import lessons, name_lessons
from lookfar.study.page import compose, definitions, figure, publish, resource, vega_lite
from lookfar.study.planned import Planned
from lookfar.study.records import METRICS, Part, Record, Row, collect, name_series, parts_of
from lookfar.study.table import Column, table

MOST = 8  # lengths that all have a column


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write `report.html`, and `figures/*.svg` and `*.pdf` beside it, and return the path of the page.

    The folders are runs and studies in any mixture; the page goes into the first of them unless `output` names a file.
    A run without rows is listed on the page.

    Raises:
        UserError: a folder holds no run, a line of `rows.jsonl` is broken, or the page cannot be written.
    """
    import vl_convert

    from lookfar.study import (
        budget_figures,
        figures,
        position_figures,
    )  # late, as vl_convert: `lookfar --help` has no time for altair

    every = collect(folders)
    records = [record for record in every if not record.trial and not record.of_task]
    names = name_series(records)
    parts = parts_of(records, names)
    learned = [record for record in every if record.answers and not record.trial]
    of_lessons = name_lessons(learned)
    looks = figures.looks(
        {name: record.label for name, record in zip(names, records, strict=True)}
        | {name: record.scheme for name, record in zip(of_lessons, learned, strict=True)}
    )
    drawn = {
        "budgets": [budget_figures.cost(part.rows, looks) for part in parts],
        "perplexity": [figures.perplexity(part.rows, looks) for part in parts],
        "by_position": [position_figures.by_position(part.rows, looks) for part in parts],
        "loss": [figures.loss(part.histories, looks) for part in parts],
    }
    of_rates = [budget_figures.rates(part.histories, looks) for part in parts]
    drawn["rates"] = [each if cost else [] for each, cost in zip(of_rates, drawn["budgets"], strict=True)]
    panels = {name: [list(map(figures.specification, each)) for each in charts] for name, charts in drawn.items()}
    page = output or Path(folders[0]) / "report.html"
    contents: dict[Path, bytes] = {}
    for name, of_parts in panels.items():
        groups = [(part.title, each) for part, each in zip(parts, of_parts, strict=True) if each]
        if groups:
            svg = vl_convert.vegalite_to_svg(figures.sheet(groups, names), vl_version=vega_lite())
            contents[page.parent / "figures" / f"{name}.svg"] = svg.encode()
            contents[page.parent / "figures" / f"{name}.pdf"] = vl_convert.svg_to_pdf(svg)
    title = _title(every)
    sections = [
        _section(part, looks, dict(zip(panels, of_part, strict=True)), alone=len(parts) == 1)
        for part, *of_part in zip(parts, *panels.values(), strict=True)
    ]
    answered = lessons(learned, of_lessons, looks)
    contents |= {page.parent / "figures" / name: content for name, content in answered.files.items()}
    sections += answered.sections
    contents[page] = compose(title, looks, _head(title, every, parts), sections).encode()
    for path, content in contents.items():
        publish(path, content)
    return page


def _title(records: Sequence[Record]) -> str:
    studies = [_study(source) for source in dict.fromkeys(record.source for record in records)]
    return (
        " · ".join(dict.fromkeys(str(study["title"]) for study in studies if study.get("title")))
        or "Train short, test long"
    )


def _study(source: Path) -> Mapping[str, Any]:
    return read_toml(source / "study.toml").get("study", {}) if (source / "study.toml").is_file() else {}


def _head(title: str, every: Sequence[Record], parts: Sequence[Part]) -> str:
    records = [record for record in every if not record.trial]
    rows = [row for record in records for row in record.measured]
    told_of = [*rows, *(row for record in records for row in record.answers)]
    lead = f"{_counted(len({record.scheme for record in records}), 'scheme')}, {_counted(len(records), 'run')}"
    if rows:
        contexts = _either(sorted({row["context"] for row in rows}))
        farthest = max(rows, key=lambda row: row["length"] / row["context"])
        factor = farthest["length"] / farthest["context"]
        lead += f", trained at {contexts} tokens and measured up to {farthest['length']:,}"
        lead += f": {factor:.3g} times as far." if factor > 1 else "."
    if answers := [row for record in records for row in record.answers]:
        times = max(row["length"] / row["trained"] for row in answers)
        lead = lead.removesuffix(".") + (
            f", {_counted(len(_values(answers, 'data')), 'task')}, answered up to {times:.3g} times the trained length."
        )
    known = _words()["protocols"]
    told = [(protocol, known.get(protocol.partition("(")[0])) for protocol in sorted(_values(told_of, "protocol"))]
    protocols = [(_spoken(protocol), sentence) for protocol, sentence in told if sentence]
    facts = [*(_facts(parts[0]) if len(parts) == 1 else []), *_choices(every)]
    return (
        f'<h1>{escape(title)}</h1>\n<p class="lead">{lead}</p>\n{definitions([*facts, *protocols])}\n{_remarks(every)}'
    )


def _choices(records: Sequence[Record]) -> list[tuple[str, str]]:
    """The rates that were tried, with their held-out losses, and the one that was taken."""
    tried: dict[str, dict[float, float]] = {}
    taken = {record.label: row["chosen_rate"] for record in records for row in record.rows if "chosen_rate" in row}
    for record in filter(lambda record: record.trial, records):
        losses = [math.log(row["value"]) for row in record.measured if row["value"] > 0]
        losses += [row["value"] for row in record.rows if row["metric"] == "loss"]  # of problems held out
        candidate = next(row["candidate"] for row in record.rows if "candidate" in row)
        tried.setdefault(record.label, {})[candidate] = losses[0] if losses else math.nan
    told = [
        f"{label}: {taken.get(label, 'none')} ("
        + ", ".join(
            f"{rate}: {loss:.3f}" if loss == loss else f"{rate}: diverged" for rate, loss in sorted(each.items())
        )
        + ")"
        for label, each in tried.items()
    ]
    return [("Rates chosen", f"by held-out loss in nats, {'; '.join(told)}")] if told else []


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
        if not record.measured and not record.answers:
            updates, planned = max(record.losses, default=0), record.setting("training", "updates")
            done = f"{updates:,}{f' of {planned:,}' if planned else ''} updates are logged"
            seed = "" if record.seed is None else f", seed {record.seed}"
            fate = f"failed ({record.failure})" if record.failure else "not measured"
            lines.append(f"{record.name} ({record.scheme}{seed}): {fate}, {done}.")
    for source in dict.fromkeys(record.source for record in records):
        known = {record.name for record in records if record.source == source}
        lines += [
            f"{run.notes.get('label') or run.run.model.scheme}, seed {run.run.training.seed}: not begun."
            for run in _planned(source)
            if run.name not in known
        ]
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<aside class="remarks"><p>Not complete</p><ul>{listed}</ul></aside>\n' if lines else ""


def _planned(source: Path) -> list[Planned]:
    """The runs of a study, where it still says them."""
    from lookfar.study.grid import expand  # late: it knows all of training

    try:
        return expand(config.read(source / "study.toml", (), Study)) if (source / "study.toml").is_file() else []
    except UserError:
        return []


def _section(part: Part, looks: Mapping[str, Any], panels: Mapping[str, Sequence[Row]], *, alone: bool) -> str:
    blocks = [] if alone else [f"<h2>{escape(part.title)}</h2>", definitions(_facts(part))]
    words = _words()
    for name, of_name in panels.items():
        if of_name:
            seeds = max((len(_values(rows, "seed")) for rows in _grouped(part.rows, "series").values()), default=1)
            band = words["bands"].get(name, "") if seeds > 1 else ""
            blocks.append(figure(of_name, words[name] + band, name))
        if of_name and name == "perplexity":
            blocks.append(table(_columns(part.rows), looks, words["table"], foot="tokens scored"))
            if units := _units(part.rows):
                summary = "<summary>Bits per byte, perplexity per word</summary>"
                blocks.append(f"<details>{summary}{table(units, looks, words['units'])}</details>")
    return "<section>\n" + "\n".join(blocks) + "\n</section>"


def _columns(rows: Sequence[Row]) -> dict[str, list[Column]]:
    """The columns of the table under the name of their protocol."""
    metrics = {metric: _grouped(rows, "metric").get(metric, []) for metric in METRICS}
    seeds = {
        name: [float(len(_values(each, "seed")))] for name, each in _grouped(metrics["perplexity"], "series").items()
    }
    columns = {
        "training": [
            Column("seeds", "", seeds, lambda each: f"{each[0]:.0f}"),
            _column("parameters", "millions", metrics["parameters"], lambda each: f"{fmean(each) / 1e6:,.3f}"),
            _column("speed", "tokens/s", metrics["tokens_per_second"], lambda each: f"{fmean(each):,.0f}", max),
            Column("time", "", _times(metrics["training_seconds"]), lambda each: _duration(fmean(each))),
        ]
    }
    return columns | _by_length("perplexity", metrics["perplexity"])


def _units(rows: Sequence[Row]) -> dict[str, list[Column]]:
    """The columns of the table of other units; a metric without a number has none."""
    columns: dict[str, list[Column]] = {}
    for metric, name in (("bits_per_byte", "bits per byte"), ("word_perplexity", "perplexity per word")):
        found = [row for row in rows if row["metric"] == metric]
        if any(math.isfinite(row["value"]) for row in found):
            columns |= _by_length(name, found)
    return columns


def _by_length(name: str, rows: Sequence[Row]) -> dict[str, list[Column]]:
    """A metric at multiples of the trained length, in each protocol."""
    from lookfar.study.figures import panels_of

    columns = {}
    for title, measured in panels_of(rows).items():
        by_length = dict(sorted(_grouped(measured, "length").items()))
        trained, farthest = measured[0]["context"], max(by_length)
        doubled = [n for n in by_length if math.log2(n / trained).is_integer()]
        shown = sorted({*doubled, farthest}) if doubled and len(by_length) > MOST else list(by_length)
        columns[f"{name}, {title}"] = [
            _column(
                f"{length / measured[0]['context']:.3g}×",
                f"{length:,}",
                by_length[length],
                _mean,
                min,
                _either(dict.fromkeys(pick(_values(by_length[length], "count")) for pick in (min, max)), "–"),
            )
            for length in shown
        ]
    return columns


def _column(head: str, note: str, rows: Iterable[Row], *rest: Any) -> Column:
    by_series = _grouped(rows, "series")
    return Column(head, note, {name: [row["value"] for row in each] for name, each in by_series.items()}, *rest)


def _mean(each: Sequence[float]) -> str:
    """The mean ± the standard deviation."""
    from lookfar.study.figures import readable

    text = readable(fmean(each))
    if len(each) == 1 or not math.isfinite(fmean(each)):
        return text
    deviation = readable(stdev(each)) if "e" in text else f"{stdev(each):,.{len(text.partition('.')[2])}f}"
    return f'{text}<span class="std">± {deviation}</span>'


def _times(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Seconds of training by series, all runs of a seed together."""
    return {
        name: [sum(row["value"] for row in of_seed) for of_seed in _grouped(each, "seed").values()]
        for name, each in _grouped(rows, "series").items()
    }


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _spoken(protocol: str) -> str:
    return protocol.replace("non_overlapping", "non-overlapping")


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


def _words() -> Mapping[str, Any]:
    return json.loads(resource("words.json"))
