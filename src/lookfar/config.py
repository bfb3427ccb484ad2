"""What a run is, as frozen, strict models that are read from TOML and changed by dotted overrides.

An unknown key, a value of the wrong type and sizes that do not fit are told at the door in one sentence each.
"""

import json
import re
import tomllib
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lookfar.errors import UserError, nearest

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


FREE = (  # what may change when a run goes on
    "evaluation",
    "data.cache",
    "model.device",
    "training.checkpoint_every",
    "training.keep",
    "training.evaluate_every",
    "training.tracking",
    "training.on_out_of_memory",
    "training.skip_not_finite",
    "training.parallel",
    "training.checkpoint_activations",
)

_building: ContextVar[bool] = ContextVar("building", default=False)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, **data: Any) -> None:
        outermost = not _building.get()
        token = _building.set(True)
        try:
            super().__init__(**data)
        except ValidationError as error:
            if not outermost:  # pydantic adds where the error lies, the outermost model tells it
                raise
            raise UserError(explain(error, type(self))) from error
        finally:
            _building.reset(token)


class ModelConfig(_Settings):
    """The size and the scheme of a decoder. What is None is derived from the rest."""

    vocabulary: Count | None = None  # None: the tokenizer's
    width: Count = 128
    layers: Count = 4
    heads: Count = 4  # of the plain transformer; a merge of several maps divides them its own way
    groups: Count | None = None  # key and value heads; None: as many as heads
    head_width: Count | None = None  # None: width / heads
    hidden: Count | None = None  # width of the feed-forward layer; None: 8/3 width for swiglu, 4 width for the others
    context: Count = 128  # tokens per training sequence
    positions: Count | None = None  # size of a learned table; None: context
    scheme: str | Annotated[tuple[str, ...], Field(min_length=1)] = (
        "rope"  # several: a pattern that cycles over the layers
    )
    window: Count | Annotated[tuple[Count | None, ...], Field(min_length=1)] | None = (
        None  # tokens that a query sees, itself included; None: all
    )
    activation: Literal["swiglu", "gelu", "relu"] = "swiglu"
    tied: bool = True  # one matrix embeds tokens and predicts them
    qk_norm: bool = False
    slots: Count | None = None  # tokens that can be predicted at once, by slots after the text; None: one by one only
    slot_positions: Literal["offset", "shared"] = "offset"  # 1, 2, 3, … after the text that a slot follows, or all 1
    slot_embeddings: Literal["own", "one"] = "own"  # a learned embedding for each slot, or one for all
    dropout: Fraction = 0.0  # on what each attention and feed-forward layer adds
    embedding_dropout: Fraction = 0.0
    attention_soft_cap: Positive | None = None
    logit_soft_cap: Positive | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of the parameters

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if self.head_width is None and self.width % self.heads:
            near = min((n for n in range(1, self.width + 1) if self.width % n == 0), key=lambda n: abs(n - self.heads))
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width}); try heads={near}")
        if self.groups is not None and self.heads % self.groups:
            raise ValueError(f"groups ({self.groups}) must divide heads ({self.heads}); try groups={self.heads}")
        if self.positions is not None and self.positions < self.context:
            raise ValueError(f"positions ({self.positions}) must be at least context ({self.context})")
        if self.slots is None and (self.slot_positions, self.slot_embeddings) != ("offset", "own"):
            raise ValueError("slot_positions and slot_embeddings are of slots; set slots, such as slots=4")
        if self.slots and self.slots > 1 and (self.slot_positions, self.slot_embeddings) == ("shared", "one"):
            raise ValueError(
                "slots of one position and one embedding all give the same answer; "
                "set slot_embeddings='own' or slot_positions='offset'"
            )
        return self


class DataConfig(_Settings):
    """Which text, and how it becomes tokens."""

    source: str = "python_library"  # several are mixed: text_file(path=books, weight=2) + python_library
    path: str | None = None  # text_file: a file or folder; hugging_face: a name on the hub
    documents: Literal["joined", "isolated"] = "joined"  # isolated: attention stops where a document does
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    vocabulary: Annotated[int, Field(ge=257)] = 8192  # of bpe
    cache: str | None = None  # folder of token files; None: $LOOKFAR_CACHE or ~/.cache/lookfar


class TaskConfig(_Settings):
    """A synthetic problem with a length, which a run is trained on in place of a text."""

    name: str | None = None  # such as copy, addition(order=reversed): `lookfar tasks`; None: a text
    lengths: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None  # trained on; None: the task's own
    scratchpad: str | None = None  # steps that are written before the answer, of the parts icovr; None: none
    bos: bool = True  # every problem begins with the same token
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1  # part of the problems of those lengths that only measures
    examples: Count = 100  # measured at each length

    @model_validator(mode="after")
    def _fits(self) -> "TaskConfig":
        if self.name is None and self != TaskConfig.model_construct():
            raise ValueError("task.name is missing; name a task, such as name='addition'")
        return self


class TrainingConfig(_Settings):
    """How a model is trained. Lengths are in updates."""

    updates: Annotated[int, Field(ge=0)] = 1000
    batch: Count = 32  # sequences per update, accumulated ones included
    accumulation: Count = 1  # pieces that a batch is computed in
    on_out_of_memory: Literal["stop", "halve"] = "stop"  # halve: smaller pieces from there on, the same result
    parallel: Literal["replicated", "sharded"] = "replicated"  # among processes: each has the whole model, or a part
    checkpoint_activations: bool = False  # keep the inputs of layers only, and compute the rest again backwards
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices between hidden states, AdamW for the rest
    objective: str = "next_token"  # also slots(anchors=16): several tokens at once
    rate: Positive = 1e-3  # the peak
    schedule: str = "cosine"  # also constant, linear, wsd(decay=0.2), wsd_s(budgets=[1000, 2000]) …: docs/schedules.md
    warmup: Annotated[int, Field(ge=0)] | None = None  # None: a twentieth of the updates, or of the first budget
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1  # rate at the end of a decay as a fraction of the peak
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Positive | None = 1.0
    skip_not_finite: Annotated[int, Field(ge=0)] = 0  # updates, in all, that may be passed over for such a loss
    numbering: str = (
        "consecutive"  # also randomized(largest=2048), interpolated; of digits: abacus(largest=100), coupled
    )
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 products where the processor has them
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Count | None = None  # None: at the end, and when interrupted
    keep: Count = 1  # checkpoints besides the best
    evaluate_every: Count | None = None  # held-out loss during training
    branch: str | None = None  # RUN@UPDATE: go on from a checkpoint of another run (--from)
    reset_optimizer: bool = False  # of a branch: forget the optimizer's state
    weights: str | None = None  # RUN or RUN@UPDATE: start with its weights alone (--weights)
    tracking: Literal["wandb", "tensorboard", "trackio"] | None = None  # where the log goes besides log.jsonl

    @model_validator(mode="after")
    def _fits(self) -> "TrainingConfig":
        if self.batch % self.accumulation:
            raise ValueError(f"accumulation ({self.accumulation}) must divide batch ({self.batch})")
        if self.warmup is not None and self.warmup > self.updates:
            raise ValueError(f"warmup ({self.warmup}) must not exceed updates ({self.updates})")
        if self.branch is not None and self.weights is not None:
            raise ValueError("branch and weights are two ways to start; give one of them")
        if self.reset_optimizer and self.branch is None:
            raise ValueError("reset_optimizer is of a branch; give branch='RUN@UPDATE'")
        return self


class EvaluationConfig(_Settings):
    """Which lengths are measured, in which protocols."""

    lengths: tuple[Count, ...] | None = None  # None: the context times 1, 2, 4, 8, 16; of a task: its own
    protocols: tuple[str, ...] = ("non_overlapping", "sliding")  # also last(k=256) …: docs/protocols.md
    tokens: Count | None = None  # most tokens scored per length; a protocol may set its own: sliding(tokens=16384)
    by_position: bool = False  # also the loss by place in the window
    split: Literal["valid", "test"] = "valid"
    numbering: str = "consecutive"  # of the tokens of a window: also randomized(largest=2048), interpolated


class Run(_Settings):
    """All that decides a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths to evaluate, in tokens."""
        return self.evaluation.lengths or tuple(self.model.context * factor for factor in (1, 2, 4, 8, 16))


class Variant(_Settings):
    """A run of a study by its name: other keys of it are what it changes, as `training.updates = 200`."""

    name: Annotated[str, Field(pattern="^[a-z0-9][a-z0-9_.+=-]*$")]  # of its folder, before the seed
    label: str | None = None  # of its curve in the report, which runs of several budgets share; None: the name
    set: dict[str, Any] = {}  # frozen: dotted keys and their values

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("set", {}), dict):
            return content  # refused as what it is
        own = {key: content[key] for key in ("name", "label") if key in content}
        rest = {key: value for key, value in content.items() if key not in ("name", "label", "set")}
        return {**own, "set": {**_flat(content.get("set", {})), **_flat(rest)}}


class StudyConfig(_Settings):
    """What a study varies: each scheme, each of its runs and each point of its grid is trained with each seed."""

    schemes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # None: that of the model
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    title: str = "Train short, test long"
    grid: dict[str, Any] = {}  # dotted keys and lists of values, of which every combination is a run
    runs: tuple[Variant, ...] = ()  # in turn, each with its own changes; a branch names another: "wsd@800"
    choose_rate: Annotated[tuple[Positive, ...], Field(min_length=2)] | None = None  # each is tried before the seeds
    choose_updates: Count | None = None  # of such a trial; None: as many as the run
    choose_seed: Annotated[int, Field(ge=0)] | None = None  # of such a trial; None: 1000, or the next that is no seed

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, content: Any) -> Any:
        grid = content.get("grid") if isinstance(content, dict) else None
        return {**content, "grid": _flat(grid)} if isinstance(grid, dict) else content

    @model_validator(mode="after")
    def _fits(self) -> "StudyConfig":
        for key, values in self.grid.items():
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"study.grid.{key} ({_toml(values)}) must be a list of values")
        if self.choose_rate is None and (self.choose_updates, self.choose_seed) != (None, None):
            raise ValueError("choose_updates and choose_seed are of choose_rate; set study.choose_rate=[1e-3, 3e-3]")
        return self


class Study(Run):
    """A run, and what is varied in it."""

    study: StudyConfig


def read(path: Path, overrides: Iterable[str] = (), kind: type[Run] = Run) -> Any:
    """Read a recipe and apply overrides such as `training.updates=40`."""
    return build(read_toml(path), overrides, kind)


def read_toml(path: Path) -> dict[str, Any]:
    """The plain content of a TOML file; a broken one is told with its line and column."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no recipe {path}.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; name a TOML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} does not decode.") from error
    except tomllib.TOMLDecodeError as error:
        lines = path.read_text(encoding="utf-8").split("\n")
        end = f"at line {len(lines)}, column {len(lines[-1]) + 1}"
        raise UserError(f"{path} is not valid TOML: {str(error).replace('at end of document', end)}.") from error


def build(content: dict[str, Any], overrides: Iterable[str] = (), kind: type[Run] = Run) -> Any:
    """A checked run of plain content, with overrides applied first; the word "none" stands for None."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{override!r} is not an override; write it as 'training.updates=40'.")
        content = put(content, key.strip(), _literal(text.strip()))
    return kind(**_with_none(content))


def put(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Plain content with the value under a dotted key."""
    return _put(content, key.split("."), value, key)


def write_toml(content: dict[str, Any]) -> str:
    """Plain content as TOML, tables and lists of tables in it; None is written as "none", which `build` reads."""
    tables: dict[str, dict[str, Any]] = {"": {}}
    lists: list[tuple[str, dict[str, Any]]] = []
    for key, value in content.items():
        if not isinstance(value, dict):
            tables[""][key] = value
            continue
        tables[f"[{key}]"] = {name: each for name, each in value.items() if not _is_tables(each)}
        lists += [(f"[[{key}.{name}]]", table) for name, each in value.items() if _is_tables(each) for table in each]
    blocks = [[head] * bool(head) + _assignments(table) for head, table in [*tables.items(), *lists]]
    return "\n\n".join("\n".join(block) for block in blocks).strip() + "\n"


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One sentence for each thing that a configuration got wrong."""
    return " ".join(dict.fromkeys(_sentence(detail, model) for detail in error.errors()))


def _sentence(detail: Any, model: type[BaseModel]) -> str:
    place = [str(part) for part in detail["loc"] if str(part) in _keys(model) or detail["type"] == "extra_forbidden"]
    key = ".".join(place)
    if detail["type"] == "extra_forbidden":
        if key == "study" and not issubclass(model, Study):
            return "This recipe is that of a study; use `lookfar study`, or take its table [study] out."
        owner = _owner(model, place[:-1])
        return f"There is no setting {key!r}. {nearest(place[-1], list(owner.model_fields))}"
    if detail["type"] == "missing":
        if detail["loc"] == ("study",):
            return "This recipe has no table [study] that says what is varied; use `lookfar train` for a single run."
        return f"The setting {'.'.join(str(part) for part in detail['loc'])!r} is missing."
    reason = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}: {reason}." if key else f"{reason}."
    return f"{key} = {_toml(detail['input'])} is not possible: {reason[0].lower()}{reason[1:]}."


def _keys(model: type[BaseModel]) -> set[str]:
    found = set(model.model_fields)
    for each in model.model_fields.values():
        if isinstance(each.annotation, type) and issubclass(each.annotation, BaseModel):
            found |= _keys(each.annotation)
    return found


def _owner(model: type[BaseModel], place: list[str]) -> type[BaseModel]:
    for part in place:
        each = model.model_fields.get(part)
        if each is not None and isinstance(each.annotation, type) and issubclass(each.annotation, BaseModel):
            model = each.annotation
    return model


def _put(content: dict[str, Any], path: list[str], value: Any, key: str) -> dict[str, Any]:
    if len(path) == 1:
        return {**content, path[0]: value}
    inner = content.get(path[0], {})
    if not isinstance(inner, dict):
        raise UserError(f"{key!r} leads nowhere: {path[0]!r} is a value, not a table.")
    return {**content, path[0]: _put(inner, path[1:], value, key)}


def _literal(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _is_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, dict) for each in value)


def _assignments(table: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key, value in table.items():
        name = prefix + (key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml(key))
        lines += _assignments(value, f"{name}.") if isinstance(value, dict) else [f"{name} = {_toml(value)}"]
    return lines


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Tables in tables as one table of dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _with_none(value: Any) -> Any:
    """The value with every word "none" in it as None."""
    if isinstance(value, dict):
        return {key: _with_none(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_with_none(each) for each in value)
    return None if value == "none" else value


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    if value is None:
        return '"none"'
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool) else str(value)
