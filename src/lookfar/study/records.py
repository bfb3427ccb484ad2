"""Reads runs from folders: their rows, the losses of their training, and which of them can be compared."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from lookfar import files
from lookfar.config import FREE, read_toml
from lookfar.errors import UserError

Row = Mapping[str, Any]
Group = tuple[str, int, str]  # data, trained length and unit: only what shares them can be compared

FILES = ("run.toml", "rows.jsonl", "error.txt")  # one of them makes a folder a run
OF_TEXT = ("perplexity", "bits_per_byte", "word_perplexity", "loss_at")  # measured on data, at a length, in a unit
METRICS = (*OF_TEXT, "accuracy", "parameters", "tokens_per_second", "training_seconds")
KEYS = {"scheme": str, "seed": int, "data": str, "protocol": str, "length": int, "count": int, "context": int}
INDIFFERENT = {"training.seed", *FREE}  # settings that leave the numbers of a run what they are


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
    rates: Mapping[int, float]
    failure: str  # the last line of error.txt

    @property
    def label(self) -> str:
        """The name of its curve: what its study calls it, else its scheme."""
        return next((row["label"] for row in self.rows if isinstance(row.get("label"), str)), self.scheme)

    @property
    def labelled(self) -> bool:
        """Whether its study says which runs share a curve."""
        return any("label" in row for row in self.rows)

    @property
    def trial(self) -> bool:
        """Whether it was only trained to choose a rate."""
        return any("candidate" in row for row in self.rows)

    @property
    def measured(self) -> list[Row]:
        """The rows of perplexity."""
        return [row for row in self.rows if row["metric"] == "perplexity"]

    @property
    def of_task(self) -> bool:
        """Whether it was trained on a task and not on a text."""
        return bool(self.answers) or self.setting("task", "name") not in (None, "none")

    @property
    def answers(self) -> list[Row]:
        """The rows of exact answers to problems, each with its `split`: held_out, longer or other."""
        return [row for row in self.rows if row["metric"] == "accuracy"]

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
    histories: Sequence[Row]  # `series`, `curve`, `run`, `update`, `loss` and `rate` of each run that was trained here

    @property
    def title(self) -> str:
        """The group in words."""
        data, context, unit = self.group
        return f"{data}, trained at {context:,} tokens, perplexity per {unit}"


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
    """Name the curve of every run: its label, and its folder too where runs would be taken for each other.

    Runs share a curve, with a band over seeds, only if nothing but the seed tells them apart.
    """
    names = [record.label for record in records]
    for finer in (
        [record.source.resolve().name for record in records],
        [record.folder.resolve().name for record in records],
        [f"{record.folder}/{record.name}" for record in records],
    ):
        alike = [(a, b) for a, b in combinations(range(len(records)), 2) if names[a] == names[b]]
        mixed = {names[a] for a, b in alike if not _may_share(records[a], records[b])}
        names = [
            f"{record.label} · {place}" if name in mixed else name
            for record, name, place in zip(records, names, finer, strict=True)
        ]
    return names


def _may_share(one: Record, other: Record) -> bool:
    """Whether two runs of a label are seeds or budgets of one thing, or never stand on one axis."""

    def decisive(record: Record) -> dict[str, Any]:
        sections = {name: record.settings.get(name, {}) for name in ("model", "data", "training")}
        settings = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
        return {key: value for key, value in settings.items() if key not in INDIFFERENT}

    if one.groups and other.groups and not set(one.groups) & set(other.groups):
        return True
    if one.labelled and other.labelled and one.source == other.source:
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
    updates = [line for line in lines if line.get("loss") is not None]
    losses = {line["update"]: float(line["loss"]) for line in updates}
    rates = {line["update"]: float(line["rate"]) for line in updates if "rate" in line}
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
        Record(
            folder,
            source,
            *run,
            settings,
            rows,
            {} if place else losses,
            {} if place else rates,
            failure.rpartition("\n")[2],
        )
        for place, (run, rows) in enumerate(runs.items())
    ]


def _read_rows(path: Path) -> list[Row]:
    """The rows of known metrics; of one measurement that which scored most, of such the last."""
    kept: dict[tuple[Any, ...], Row] = {}
    for number, line in enumerate(files.read_lines(path), start=1):
        if line.get("metric") in METRICS or line.get("protocol") == "held_out":
            row = _checked(line, f"{path}, line {number}")
            about = ("run", "metric", "unit", "update", "checkpoint", "scratchpad", "from", *KEYS)
            if row.get("numbering"):
                row = {**row, "protocol": f"{row['protocol']}, {row['numbering']}"}
            key = tuple(row.get(name) for name in about if name != "count")
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


def parts_of(records: Sequence[Record], names: Sequence[str]) -> list[Part]:
    """The groups that runs were trained in, then those in which they were measured besides."""
    homes = [_home(record, records) for record in records]
    groups = dict.fromkeys([*homes, *(group for record in records for group in record.groups)])
    ends = [(name, record.setting("training", "updates")) for name, record in zip(names, records, strict=True)]
    several = {name for name in names if len({end for each, end in ends if each == name}) > 1}
    curves = [f"{name}, {end}" if name in several else name for name, end in ends]
    parts = []
    for group in groups:
        there, rows, histories = [], [], []
        for record, name, curve, home in zip(records, names, curves, homes, strict=True):
            if group in (home, *record.groups):
                there.append(record)
                about_training = [row for row in record.rows if row["metric"] not in OF_TEXT]
                of_text = [row for row in record.rows if row["metric"] in OF_TEXT]
                measured = [row for row in of_text if (row["data"], row["context"], row["unit"]) == group]
                rows += [{**row, "series": name} for row in (*about_training, *measured)]
            if group == home:
                about = {"series": name, "curve": curve, "run": f"{record.folder}/{record.name}"}
                drawn = {"update": list(record.losses), "loss": list(record.losses.values())}
                histories.append({**about, **drawn, "rate": [record.rates.get(update) for update in record.losses]})
        if rows or any(each["update"] for each in histories):  # a run that failed at once has nothing to show
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
