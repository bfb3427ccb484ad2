"""The part of a report that tells how exactly models answer problems, and how much longer than they were trained on."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import fmean, stdev
from typing import Any

from lookfar.errors import UserError
from lookfar.study.page import definitions, figure, resource, vega_lite
from lookfar.study.records import INDIFFERENT, Record, Row
from lookfar.study.statistics import Comparison, area, compare, longest, mean_reciprocal_rank
from lookfar.study.table import Column, table

LEAST = 0.9  # of accuracy, for a length to count as reached
OF_PROBLEMS = {*INDIFFERENT, "task.name", "task.scratchpad", "task.examples"}  # told by rows, or nothing of a curve


@dataclass(frozen=True)
class Lessons:
    """Sections of the page, and the figures on paper by name."""

    sections: list[str] = field(default_factory=list)
    files: Mapping[str, bytes] = field(default_factory=dict)


def lessons(records: Sequence[Record], names: Sequence[str], looks: Mapping[str, Any]) -> Lessons:
    """Accuracy by length, the ranking and the scratchpads of runs that were trained on tasks; nothing without any.

    Their curves have the names of `name_lessons`, and `looks` by these names.
    """
    if not records:
        return Lessons()
    import vl_convert

    from lookfar.study import length_figures

    rows = [{**row, "scheme": name} for record, name in zip(records, names, strict=True) for row in record.answers]
    last = [row for row in rows if row.get("checkpoint") != "best"]
    unranked = ""
    drawn: dict[str, Any] = {"accuracy": length_figures.accuracy(last, looks)}
    if len({row["scheme"] for row in last}) > 1 and any(row["split"] == "longer" for row in last):
        try:
            drawn["ranking"] = length_figures.ranking(last, looks)
        except UserError as error:  # the rest of the page does not need it
            unranked = str(error)
    if len({row.get("scratchpad") for row in last}) > 1:
        drawn["scratchpads"] = length_figures.scratchpads(last, looks)
    words, blocks, files = json.loads(resource("words.json")), [], {}
    for name, chart in drawn.items():
        svg = vl_convert.vegalite_to_svg(chart.to_dict(validate=False), vl_version=vega_lite())
        files |= {f"{name}.svg": svg.encode(), f"{name}.pdf": vl_convert.svg_to_pdf(svg)}
        blocks.append(figure(length_figures.panels(chart), words[name], name))
        if name == "accuracy":
            blocks.append(table(_columns(rows), looks, words["answers"]))
        if name == "ranking":
            blocks.append(_against_the_best(last, looks, words["compared"]))
    if unranked:
        blocks.append(f"<p>Not ranked: {escape(unranked)}</p>")
    return Lessons(["<section>\n" + "\n".join([_facts(records), *blocks]) + "\n</section>"], files)


def _facts(records: Sequence[Record]) -> str:
    """What was trained, from the settings of the runs; several values stand side by side."""

    def stated(section: str, key: str, text: str) -> str:
        values = {record.setting(section, key) for record in records} - {None}
        return text.format(" or ".join(f"{value:,}" for value in sorted(values))) if values else ""

    sizes = sorted({row["value"] for record in records for row in record.rows if row["metric"] == "parameters"})
    millions = " to ".join(dict.fromkeys(f"{size / 1e6:,.3f}" for size in sizes[:1] + sizes[-1:]))
    seeds = sorted({record.seed for record in records if record.seed is not None})
    facts = {
        "Model": [
            stated("model", "layers", "{} layers"),
            stated("model", "width", "width {}"),
            stated("model", "heads", "{} heads"),
            f"{millions} million parameters" * bool(sizes),
        ],
        "Training": [
            stated("training", "updates", "{} updates"),
            stated("training", "batch", "batches of {} problems"),
            stated("training", "rate", "peak rate {}"),
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" * bool(seeds),
        ],
    }
    told = [(term, ", ".join(filter(None, each))) for term, each in facts.items()]
    return definitions([(term, text) for term, text in told if text])


def name_lessons(records: Sequence[Record]) -> list[str]:
    """A curve for each scheme; where more than seeds tell its runs on one task apart, also by what does.

    That is the label of the run in its study, else what its settings vary, its folder, and its name without the seed.
    """
    names = [record.scheme for record in records]
    mixed = _mixed(records, names)
    names = [record.label if name in mixed else name for record, name in zip(records, names, strict=True)]
    folders = [record.source.resolve().name for record in records]
    for finer in (_settings(records), folders, [each.name.removesuffix(f"-s{each.seed}") for each in records]):
        mixed = _mixed(records, names)
        names = [
            f"{name} · {more}" if name in mixed and more else name for name, more in zip(names, finer, strict=True)
        ]
    return names


def _mixed(records: Sequence[Record], names: Sequence[str]) -> set[str]:
    """Names under which two runs answer the same problems with the same seed."""
    seen: dict[tuple[Any, ...], set[int]] = {}
    for place, record in enumerate(records):
        for row in record.answers:
            keys = ("data", "scratchpad", "length", "seed", "checkpoint", "protocol")
            seen.setdefault((names[place], *(row.get(key) for key in keys)), set()).add(place)
    return {names[place] for places in seen.values() if len(places) > 1 for place in places}


def _settings(records: Sequence[Record]) -> list[str]:
    """What tells the runs of a scheme apart besides seed and task: `width=64, rate=0.001`."""
    told = []
    for record in records:
        alike = [other for other in records if other.scheme == record.scheme]
        sections = ("model", "training", "task")
        keys = [(section, key) for section in sections for key in record.settings.get(section, {})]
        varied = [
            f"{key}={record.setting(section, key)}"
            for section, key in keys
            if f"{section}.{key}" not in OF_PROBLEMS and len({str(other.setting(section, key)) for other in alike}) > 1
        ]
        told.append(", ".join(varied))
    return told


def _columns(rows: Sequence[Row]) -> dict[str, list[Column]]:
    """For each task: accuracy on trained and on longer lengths, how far it reaches, and that of the best checkpoint."""
    found = {}
    for data in dict.fromkeys(_task(row) for row in rows):
        of_task = [row for row in rows if _task(row) == data]
        last = [row for row in of_task if row.get("checkpoint") != "best"]
        best = [row for row in of_task if row.get("checkpoint") == "best"]
        found[data] = [
            Column("trained", "lengths, held out", _by_seed(last, "held_out", _mean), _accuracy, max),
            Column("longer", "lengths", _by_seed(last, "longer", _mean), _accuracy, max),
            Column("reach", f"accuracy ≥ {LEAST:g}", _by_seed(last, None, _reach), _length, max),
            Column("area", "beyond training", _by_seed(last, "longer", _area), _accuracy, max),
        ]
        if best:
            found[data].append(Column("longer", "best checkpoint", _by_seed(best, "longer", _mean), _accuracy, max))
    return {data: [each for each in columns if each.values] for data, columns in found.items()}


def _against_the_best(rows: Sequence[Row], looks: Mapping[str, Any], caption: str) -> str:
    """The table of each scheme less the one that leads the ranking, paired by task, scratchpad, seed and length."""
    ranks = mean_reciprocal_rank(rows).schemes
    best = max(ranks, key=lambda scheme: ranks[scheme].value)
    found = {scheme: compare(rows, scheme, best) for scheme in ranks if scheme != best}

    def column(head: str, note: str, values: Callable[[Comparison], Sequence[float]], show: Any) -> Column:
        of_schemes = {scheme: [float(value) for value in values(each)] for scheme, each in found.items()}
        return Column(head, note, {scheme: each for scheme, each in of_schemes.items() if each}, show)

    columns = [
        column("difference", "of accuracy", lambda each: [each.difference.value], _signed),
        column("95% interval", "over seeds", lambda each: each.difference.interval or (), _signed),
        column("p", "sign flips", lambda each: [] if each.p_value is None else [each.p_value], _probability),
        column("higher", "pairs", lambda each: [each.wins], _count),
        column("lower", "pairs", lambda each: [each.losses], _count),
        column("equal", "pairs", lambda each: [each.ties], _count),
    ]
    told = caption.format(best=escape(best), pairs=_range(each.difference.cells for each in found.values()))
    seeds = max(each.difference.seeds for each in found.values())
    told += (
        f" With {seeds} seeds p is never below {2 / 2**seeds:.2g}."
        if seeds > 1
        else " A single seed has neither interval nor p."
    )
    gone = {scheme: len({missing.cell for missing in each.missing}) for scheme, each in found.items()}
    if any(gone.values()):
        listed = ", ".join(f"{escape(scheme)} {count:,}" for scheme, count in gone.items() if count)
        told += f" Pairs left out because one of the two has no number: {listed}."
    return table({f"against {best}": [each for each in columns if each.values]}, looks, told)


def _task(row: Row) -> str:
    return f"{row['data']}, scratchpad {row['scratchpad']}" if row.get("scratchpad") else row["data"]


def _by_seed(rows: Iterable[Row], split: str | None, value: Any) -> dict[str, list[float]]:
    curves: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        if split is None or row["split"] == split:
            curves.setdefault((row["scheme"], row["seed"]), {})[row["length"]] = row["value"]
    found: dict[str, list[float]] = {}
    for (scheme, _), curve in curves.items():
        found.setdefault(scheme, []).append(value(list(curve), list(curve.values())))
    return found


def _mean(lengths: Sequence[int], accuracies: Sequence[float]) -> float:
    return fmean(accuracies)


def _area(lengths: Sequence[int], accuracies: Sequence[float]) -> float:
    return area(lengths, accuracies)


def _reach(lengths: Sequence[int], accuracies: Sequence[float]) -> float:
    return float(longest(lengths, accuracies, at_least=LEAST) or 0)


def _accuracy(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" + _deviation(values, 2)


def _length(values: Sequence[float]) -> str:
    whole = all(value == values[0] for value in values)
    return f"{values[0]:.0f}" if whole else f"{fmean(values):.1f}" + _deviation(values, 1)


def _signed(values: Sequence[float]) -> str:
    """Numbers with their sign, from the first to the last."""
    return " to ".join(f"{value:+.3f}".replace("-", "−") for value in values)


def _probability(values: Sequence[float]) -> str:
    return f"{values[0]:.2g}"


def _count(values: Sequence[float]) -> str:
    return f"{values[0]:,.0f}"


def _range(counts: Iterable[int]) -> str:
    """`315`, or `300 to 315` where they differ."""
    found = sorted(set(counts))
    return " to ".join(f"{count:,}" for count in dict.fromkeys((found[0], found[-1])))


def _deviation(values: Sequence[float], digits: int) -> str:
    return f'<span class="std">± {stdev(values):.{digits}f}</span>' if len(values) > 1 else ""
