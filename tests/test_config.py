"""Configuration is checked at the door, told in sentences, and read back from TOML as it was written."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from lookfar.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Run,
    Study,
    StudyConfig,
    TaskConfig,
    TrainingConfig,
    Variant,
    build,
    read,
    read_toml,
    write_toml,
)
from lookfar.errors import UserError
from lookfar.model.decoder import layer_scheme, layer_window

RECIPES = Path(__file__).parents[1] / "recipes"

OTHER = Study(  # every field differs from its default
    model=ModelConfig(
        vocabulary=300,
        width=48,
        layers=3,
        heads=6,
        groups=3,
        head_width=10,
        hidden=40,
        context=20,
        positions=24,
        scheme=("alibi", "dape_v2(kernel=5) + t5"),
        window=(8, None, 4),
        activation="gelu",
        tied=False,
        qk_norm=True,
        slots=1,
        slot_positions="shared",
        slot_embeddings="one",
        dropout=0.25,
        embedding_dropout=1e-5,
        attention_soft_cap=30.0,
        logit_soft_cap=2e20,
        device="cpu",
        dtype="bfloat16",
    ),
    data=DataConfig(
        source="text_file",
        path='a "b"\\c\n\x7fé😀',
        documents="isolated",
        tokenizer="bpe",
        vocabulary=400,
        cache="/cache",
    ),
    task=TaskConfig(
        name="addition(order=reversed)", lengths=(2, 3), scratchpad="co", bos=False, held_out=0.2, examples=7
    ),
    training=TrainingConfig(
        updates=7,
        batch=6,
        accumulation=3,
        on_out_of_memory="halve",
        parallel="sharded",
        checkpoint_activations=True,
        optimizer="muon",
        objective="slots(anchors=2)",
        rate=3e-4,
        schedule="linear",
        warmup=2,
        floor=0.0,
        betas=(0.8, 0.99),
        weight_decay=0.0,
        clip=None,
        skip_not_finite=3,
        precision="float32",
        numbering="randomized(largest=64)",
        seed=2**62,
        checkpoint_every=3,
        keep=2,
        evaluate_every=5,
        tracking="trackio",
        branch="runs/other@3",
        reset_optimizer=True,
    ),
    evaluation=EvaluationConfig(
        lengths=(20, 40),
        protocols=("sliding(stride=4)",),
        tokens=512,
        by_position=True,
        split="test",
        numbering="interpolated",
    ),
    study=StudyConfig(
        schemes=("nope", "rope(base=1e6)"),
        seeds=(3, 1),
        title="Kürzer [trained] = #1",
        grid={"model.width": (48, 96), "training.betas": ((0.9, 0.99), (0.8, 0.9))},
        runs=(Variant(name="short", label='a "b"', **{"training.updates": 3}), Variant(name="plain")),
        choose_rate=(1e-3, 3e-3),
        choose_updates=5,
        choose_seed=8,
    ),
)


def fields(model, prefix=""):
    """Every field of a model and of those in it: its dotted name, its value and its default."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.default


# Round trips


def test_every_field_survives_toml(tmp_path):
    same = [name for name, value, default in fields(OTHER) if value == default]
    assert same == ["training.weights"], "give it another value above"  # it excludes a branch
    file = tmp_path / "other.toml"
    file.write_text(write_toml(OTHER.model_dump()), encoding="utf-8")
    again = read(file, kind=Study)
    assert list(fields(again)) == list(fields(OTHER))
    assert again == OTHER


@pytest.mark.parametrize("kind", [Run, OTHER], ids=["defaults", "other"])
def test_a_written_recipe_is_written_the_same_again(kind):
    first = write_toml((kind() if isinstance(kind, type) else kind).model_dump())
    assert write_toml(build(tomllib.loads(first), kind=Study if "study" in first else Run).model_dump()) == first


KEYS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ATOMS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS
PLAIN = ATOMS | st.lists(ATOMS, max_size=3)


@given(content=st.dictionaries(KEYS, PLAIN | st.dictionaries(KEYS, PLAIN, max_size=3), max_size=4))
@example(content={"path": "/home/😀/\x7f\x00\x1f"})
@example(content={"rate": 1e-05, "cap": float("inf"), "no": -0.0, "list": [], "empty": {}})
def test_plain_content_survives_toml(content):
    read_again = tomllib.loads(write_toml(content))
    assert read_again == content
    assert {key: type(value) for key, value in read_again.items()} == {k: type(v) for k, v in content.items()}


def test_none_is_a_word_in_toml():
    assert write_toml({"a": None, "b": {"c": None, "d": 1}}) == 'a = "none"\n\n[b]\nc = "none"\nd = 1\n'


def test_a_pattern_of_windows_can_be_written_in_toml():
    model = ModelConfig(window=(8, None), layers=4)
    assert [layer_window(model, layer) for layer in range(4)] == [8, None, 8, None]
    assert build(tomllib.loads(write_toml({"model": model.model_dump()}))).model == model
    assert build({}, ["model.window=[8, 'none']"]).model == ModelConfig(window=(8, None))


def test_not_to_clip_can_be_written_in_toml():
    unclipped = TrainingConfig(clip=None)
    assert not unclipped.clip
    assert build(tomllib.loads(write_toml({"training": unclipped.model_dump()}))).training == unclipped
    assert build({}, ["training.clip=none"]).training == unclipped


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_reads(recipe):
    kind = Study if "[study]" in recipe.read_text() else Run
    assert isinstance(read(recipe, kind=kind), kind)


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.updates=40", "training.updates", 40),
        (" training.updates = 40 ", "training.updates", 40),
        ("training.updates=1_000", "training.updates", 1000),
        ("training.rate=3e-3", "training.rate", 3e-3),
        ("model.scheme=alibi", "model.scheme", "alibi"),
        ('model.scheme="alibi"', "model.scheme", "alibi"),
        ("model.scheme=kerple + dape_v2(kernel=3)", "model.scheme", "kerple + dape_v2(kernel=3)"),
        ('model.scheme=["rope", "nope"]', "model.scheme", ("rope", "nope")),
        ("model.tied=false", "model.tied", False),
        ("model.window=none", "model.window", None),
        ("model.window=None", "model.window", None),
        ("evaluation.lengths=[128, 256]", "evaluation.lengths", (128, 256)),
        ("data.path=a=b", "data.path", "a=b"),
        ("data.path=a # b", "data.path", "a # b"),
    ],
)
def test_an_override_sets_one_key_and_leaves_the_rest(override, key, value):
    before = {"model": {"width": 64, "window": 5}, "training": {"seed": 3}}
    changed = {name: now for name, now, _ in fields(build(before, [override]))}
    unchanged = {name: now for name, now, _ in fields(build(before))}
    assert changed == {**unchanged, key: value}
    assert before == {"model": {"width": 64, "window": 5}, "training": {"seed": 3}}


def test_the_last_override_of_a_key_holds():
    assert build({}, ["training.seed=1", "training.seed=2"]).training.seed == 2


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("training.updates", "'training.updates' is not an override; write it as 'training.updates=40'."),
        ("=40", "'=40' is not an override"),
        ("training.updats=40", "There is no setting 'training.updats'. Did you mean 'updates'?"),
        ("trainign.updates=40", "There is no setting 'trainign'. Did you mean 'training'?"),
        ("updates=40", "There is no setting 'updates'."),
        ("model.width.x=1", "'model.width.x' leads nowhere: 'width' is a value, not a table."),
        ("model=3", "model = 3 is not possible"),
        ("training.updates=", 'training.updates = "" is not possible'),
        ("training.updates=many", 'training.updates = "many" is not possible: input should be a valid integer'),
        ("training.updates=-1", "training.updates = -1 is not possible: input should be greater than or equal to 0."),
        ("training.updates=2024-01-01", "training.updates = 2024-01-01 is not possible"),
        ("training.rate=0", "training.rate = 0 is not possible: input should be greater than 0."),
        ("training.rate=nan", "training.rate = nan is not possible"),
        ("training.schedule=3", "training.schedule = 3 is not possible: input should be a valid string."),
        ("training.accumulation=3", "training: accumulation (3) must divide batch (32)."),
        ("training.warmup=1001", "training: warmup (1001) must not exceed updates (1000)."),
        ("model.heads=5", "model: heads (5) must divide width (64); try heads=4."),
        ("model.heads=0", "model.heads = 0 is not possible"),
        ("model.groups=3", "model: groups (3) must divide heads (4); try groups=4."),
        ("model.positions=5", "model: positions (5) must be at least context (128)."),
        ("model.dropout=1", "model.dropout = 1 is not possible: input should be less than 1."),
        ("model.window=0", "model.window = 0 is not possible"),
        ("model.window=[4, -1]", "model.window"),
        ("model.window=[]", "model.window"),
        ("model.scheme=[]", "model.scheme"),
        ("evaluation.lengths=[0]", "evaluation.lengths = 0 is not possible"),
        ("evaluation.split=train", 'evaluation.split = "train" is not possible'),
        ("data.vocabulary=256", "data.vocabulary = 256 is not possible"),
    ],
)
def test_a_wrong_override_is_told_in_one_line(override, answer):
    with pytest.raises(UserError) as told:
        build({"model": {"width": 64}}, [override])
    assert str(told.value).startswith(answer)
    assert "\n" not in str(told.value)
    assert "pydantic" not in str(told.value)


def test_every_mistake_is_told_at_once():
    with pytest.raises(UserError) as told:
        build({"model": {"widht": 3}, "training": {"batch": 0}})
    assert "'model.widht'" in str(told.value)
    assert "training.batch = 0" in str(told.value)


def test_a_mistake_in_python_is_told_like_one_in_a_recipe():
    with pytest.raises(UserError, match=r"^There is no setting 'widht'. Did you mean 'width'\?$"):
        ModelConfig(widht=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(UserError, match=r"^heads \(5\) must divide width \(64\); try heads=4\.$"):
        ModelConfig(width=64, heads=5)
    with pytest.raises(ValueError, match="must divide"):  # it is a ValueError, too
        Run(model=ModelConfig(width=64, heads=5))


def test_a_missing_table_is_told():
    with pytest.raises(UserError, match=r"has no table \[study\]"):
        build({}, kind=Study)
    assert build({"study": {}}, kind=Study).study.schemes is None  # that of the model
    with pytest.raises(UserError, match=r"study\.schemes"):
        build({"study": {"schemes": []}}, kind=Study)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        ModelConfig().width = 3  # pyright: ignore[reportAttributeAccessIssue]


# Files


@pytest.mark.parametrize(
    ("content", "line", "column"),
    [("[model", 1, 7), ("a = 1\nb = \n", 2, 5), ('x = "1\n"', 1, 7), ("a = 1\na = 2", 2, 6)],
)
def test_broken_toml_is_told_with_line_and_column(tmp_path, content, line, column):
    file = tmp_path / "broken.toml"
    file.write_text(content)
    with pytest.raises(UserError) as told:
        read_toml(file)
    assert str(file) in str(told.value)
    assert re.search(rf"line {line}, column {column}\b", str(told.value))


def test_a_recipe_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UserError, match=r"There is no recipe .*missing\.toml"):
        read(tmp_path / "missing.toml")
    with pytest.raises(UserError, match="is a folder; name a TOML file"):
        read(tmp_path)
    (tmp_path / "latin.toml").write_bytes('title = "é"'.encode("latin-1"))
    with pytest.raises(UserError, match=r"is not UTF-8: byte 9 does not decode"):
        read(tmp_path / "latin.toml")


# What is derived


def test_lengths_are_multiples_of_the_context_unless_stated():
    assert Run(model=ModelConfig(context=20)).lengths == (20, 40, 80, 160, 320)
    assert OTHER.lengths == (20, 40)


def test_patterns_cycle_over_the_layers():
    model = ModelConfig(layers=5, scheme=("rope", "nope"), window=(4, None, 8))
    assert [layer_scheme(model, layer) for layer in range(5)] == ["rope", "nope", "rope", "nope", "rope"]
    assert [layer_window(model, layer) for layer in range(5)] == [4, None, 8, 4, None]
