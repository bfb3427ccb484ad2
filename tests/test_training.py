"""Training: rates, groups of parameters, the loop, and what it leaves in a run's folder."""

import hashlib
import json
import math
import random
import subprocess
import sys
from threading import Event

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import lookfar
from lookfar import config, files
from lookfar.config import ModelConfig, TrainingConfig
from lookfar.errors import UserError
from lookfar.evaluation.perplexity import Perplexity
from lookfar.model.decoder import Decoder
from lookfar.training import checkpoint, folder, precision, schedules
from lookfar.training.evaluate import evaluate_run
from lookfar.training.optimizers import adamw
from lookfar.training.run import run_whole
from lookfar.training.train import train
from tolerance import assert_near

WORDS = [bytes(random.Random(number).choices(b"abcdefgh", k=1 + number % 6)).decode() for number in range(40)]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A text of 4 kB."""
    choice = random.Random(0)
    file = tmp_path_factory.mktemp("book") / "book.txt"
    file.write_text("".join(" ".join(choice.choices(WORDS, k=6)) + "\n" for _ in range(170)))
    return file


@pytest.fixture
def a_run(book):
    """A small run, with overrides such as `training.updates=3`."""

    def build(*overrides):
        content = {
            "model": {"width": 16, "layers": 1, "heads": 2, "context": 8, "scheme": "alibi", "device": "cpu"},
            "data": {"source": "text_file", "path": str(book)},
            "training": {"updates": 4, "batch": 4, "precision": "float32"},
            "evaluation": {"lengths": [8, 16], "tokens": 64},
        }
        return config.build(content, overrides)

    return build


def weights(place, update=None):
    """The bytes of the weights, by default the last, as one number."""
    last = max(checkpoint.updates(place)) if update is None else update
    return hashlib.sha256((place / "checkpoints" / str(last) / "model.safetensors").read_bytes()).hexdigest()


def log(place):
    return [line for line in files.read_lines(place / "log.jsonl") if "loss" in line]


def values(rows, metric="perplexity"):
    return {(row["protocol"], row["length"]): row["value"] for row in rows if row["metric"] == metric}


def tokens(seed=0):
    return torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(seed))


# Rates

UPDATES, FLOORS = st.integers(1, 300), st.floats(0, 1)


@st.composite
def plans(draw, shapes=("constant", "linear", "cosine")):
    updates = draw(UPDATES)
    warmup = draw(st.integers(0, updates) | st.none())
    return TrainingConfig(updates=updates, warmup=warmup, floor=draw(FLOORS), schedule=draw(st.sampled_from(shapes)))


@given(plan=plans())
def test_no_rate_exceeds_the_peak_and_none_is_negative(plan):
    assert all(0 <= schedules.rate(update, plan) <= 1 for update in range(plan.updates + 5))


@given(plan=plans())
def test_the_rate_rises_by_equal_steps_to_the_peak(plan):
    rising = schedules.warmup(plan)
    rates = [schedules.rate(update, plan) for update in range(rising)]
    assert rates == [(update + 1) / rising for update in range(rising)]


@given(plan=plans(("linear", "cosine")))
@example(plan=TrainingConfig(updates=3, warmup=0, floor=0.1, schedule="linear"))
@example(plan=TrainingConfig(updates=3, warmup=0, floor=0.0, schedule="cosine"))
def test_the_last_update_uses_exactly_the_floor_and_later_ones_too(plan):
    if schedules.warmup(plan) < plan.updates:
        assert [schedules.rate(plan.updates + later, plan) for later in (-1, 0, 9)] == [plan.floor] * 3


@given(plan=plans())
def test_after_the_warm_up_the_rate_never_rises(plan):
    rates = [schedules.rate(update, plan) for update in range(schedules.warmup(plan), plan.updates)]
    assert rates == sorted(rates, reverse=True)


@given(plan=plans(("constant",)), update=st.integers(0, 1000))
def test_a_constant_rate_is_the_peak_for_ever(plan, update):
    rising = schedules.warmup(plan)
    assert schedules.rate(rising + update, plan) == 1


@pytest.mark.parametrize(
    ("shape", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1, 0.2 + 0.8 * (2 + 2**0.5) / 4, 0.6, 0.2 + 0.8 * (2 - 2**0.5) / 4, 0.2]),
    ],
)
def test_the_rates_of_each_shape_by_hand(shape, rates):
    plan = TrainingConfig(updates=6, warmup=2, floor=0.2, schedule=shape)
    found = [schedules.rate(update, plan) for update in range(6)]
    if shape != "constant":  # the peak is reached by the warm-up, from where four updates lead to the floor
        rates = [0.5, 1, *rates[2:]]
    assert found == pytest.approx(rates)


def test_the_warm_up_is_a_twentieth_unless_stated():
    assert [schedules.warmup(TrainingConfig(updates=updates)) for updates in (0, 19, 20, 1000)] == [0, 0, 1, 50]
    assert schedules.warmup(TrainingConfig(updates=1000, warmup=0)) == 0


def test_the_rate_of_every_update_is_in_the_log(a_run, tmp_path):
    run = a_run("training.updates=7", "training.warmup=2", "training.rate=0.01")
    train(run, tmp_path)
    assert [line["rate"] for line in log(tmp_path)] == [
        0.01 * schedules.rate(update, run.training) for update in range(7)
    ]


# Groups of parameters


@pytest.mark.parametrize(
    ("scheme", "own"),
    [
        ("learned", set()),
        ("kerple + dape_v2 + stable_mask", {"scheme.methods.1.first.weight", "scheme.methods.1.second.weight"}),
        ("t5 + differential", set()),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_only_weights_of_linear_and_conv_decay(scheme, own, tied):
    model = Decoder(
        ModelConfig(vocabulary=9, width=16, layers=2, heads=2, context=8, scheme=scheme, tied=tied, qk_norm=True)
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = adamw(model, TrainingConfig(weight_decay=0.3, betas=(0.5, 0.6), rate=0.7)).param_groups
    decayed, free = ({names[id(each)] for each in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.5, 0.6) and group["lr"] == 0.7 for group in groups)
    expected = {"attention.project.weight", "attention.output.weight", "feed_forward.up.weight"}
    expected |= {"feed_forward.down.weight"} | {f"attention.{name}" for name in own}
    head = set() if tied else {"head.weight"}
    assert decayed == {f"blocks.{layer}.{name}" for layer in (0, 1) for name in expected} | head
    assert free == set(names.values()) - decayed
    assert sum(len(group["params"]) for group in groups) == len(names)


# The loop


def gradients(run, place, monkeypatch):
    """The gradients of the first update before they are clipped, and the norm that the optimizer sees."""
    before, norms = [], []
    clip, step = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def note(parameters, *arguments):
        parameters = list(parameters)
        before.append([each.grad.clone() for each in parameters])
        return clip(parameters, *arguments)

    def stepped(optimizer, *arguments):
        grads = [each.grad for group in optimizer.param_groups for each in group["params"]]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
        return step(optimizer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", note)
        patch.setattr(torch.optim.AdamW, "step", stepped)
        train(run, place)
    return before[0], norms


@pytest.mark.parametrize("numbering", ["consecutive", "randomized(largest=50)"])
@pytest.mark.parametrize("pieces", [2, 6])
def test_a_batch_in_pieces_gives_the_gradients_of_the_whole(a_run, tmp_path, monkeypatch, pieces, numbering):
    sizes = "training.batch=6", "training.updates=1", f"training.numbering={numbering}"
    whole, _ = gradients(a_run(*sizes), tmp_path / "whole", monkeypatch)
    calls = []
    forward = Decoder.forward

    def noted(model, given, **settings):
        calls.append(given.shape)
        return forward(model, given, **settings)

    monkeypatch.setattr(Decoder, "forward", noted)
    run = a_run(*sizes, f"training.accumulation={pieces}")
    parts, _ = gradients(run, tmp_path / "parts", monkeypatch)
    assert calls == [(6 // pieces, 8)] * pieces
    for one, other in zip(whole, parts, strict=True):
        assert_near(other, one)
    assert log(tmp_path / "parts")[0]["loss"] == pytest.approx(log(tmp_path / "whole")[0]["loss"], rel=1e-5)
    assert log(tmp_path / "parts")[0]["norm"] == pytest.approx(log(tmp_path / "whole")[0]["norm"], rel=1e-5)


def test_long_gradients_are_clipped_and_logged_as_they_were(a_run, tmp_path, monkeypatch):
    _, free = gradients(a_run("training.clip=none"), tmp_path / "free", monkeypatch)
    assert free == pytest.approx([line["norm"] for line in log(tmp_path / "free")], rel=1e-5)
    assert min(free) > 0.01
    _, clipped = gradients(a_run("training.clip=0.01"), tmp_path / "clipped", monkeypatch)
    assert clipped == pytest.approx([0.01] * 4, rel=1e-3)
    assert log(tmp_path / "clipped")[0]["norm"] == pytest.approx(free[0], rel=1e-5)
    _, long = gradients(a_run("training.clip=1000"), tmp_path / "long", monkeypatch)
    assert long == free


@pytest.mark.parametrize("scheme", ["rope", "kerple + dape_v2", "learned + differential"])
def test_the_loss_falls(a_run, tmp_path, scheme):
    sizes = "training.updates=40", "training.rate=0.02", f"model.scheme={scheme}", "evaluation.lengths=[8]"
    train(a_run(*sizes), tmp_path)
    losses = [line["loss"] for line in log(tmp_path)]
    assert losses[0] > math.log(256) - 0.5
    assert sum(losses[-5:]) / 5 < losses[0] / 2


def test_the_log_has_a_line_for_each_update(a_run, tmp_path):
    events = []
    train(a_run("training.updates=5"), tmp_path, events.append)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(set(line) == {"update", "loss", "rate", "norm", "tokens", "seconds"} for line in lines)
    assert [line["tokens"] for line in lines] == [4 * 8 * update for update in range(1, 6)]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    told = [{key: event[key] for key in lines[0]} for event in events if event["event"] == "update"]
    assert told == lines


def test_the_held_out_loss_is_logged_when_asked_and_changes_nothing(a_run, tmp_path):
    train(a_run("model.dropout=0.2"), tmp_path / "without")
    train(a_run("model.dropout=0.2", "training.evaluate_every=2"), tmp_path / "with")
    lines = files.read_lines(tmp_path / "with" / "log.jsonl")
    assert [line["update"] for line in lines if "valid_loss" in line] == [2, 4]
    assert all(0 < line["valid_loss"] < 10 for line in lines if "valid_loss" in line)
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


def test_no_updates_leave_the_fresh_model(a_run, tmp_path):
    model = train(a_run("training.updates=0"), tmp_path)
    assert checkpoint.updates(tmp_path) == [0]
    assert torch.equal(lookfar.load(tmp_path)(tokens()), model(tokens()))


CHANGES = {
    "updates": "5",
    "batch": "2",
    "optimizer": "muon",
    "rate": "2e-3",
    "schedule": "linear",
    "warmup": "3",
    "floor": "0.5",
    "betas": "[0.8, 0.95]",
    "weight_decay": "0.5",
    "clip": "0.5",
    "precision": "bfloat16",
    "seed": "1",
    "numbering": "randomized(largest=32)",
}
SEEN_ELSEWHERE = {
    "parallel",
    "checkpoint_activations",
    "branch",
    "reset_optimizer",
    "weights",
    "objective",
    "accumulation",
    "checkpoint_every",
    "keep",
    "evaluate_every",
    "on_out_of_memory",
    "skip_not_finite",
    "tracking",
}


def test_every_setting_of_training_is_tested():
    assert set(CHANGES) | SEEN_ELSEWHERE == set(TrainingConfig.model_fields)


@pytest.mark.parametrize("setting", CHANGES)
def test_every_setting_changes_the_weights(a_run, tmp_path, setting):
    train(a_run(), tmp_path / "plain")
    train(a_run(f"training.{setting}={CHANGES[setting]}"), tmp_path / "changed")
    assert weights(tmp_path / "plain") != weights(tmp_path / "changed")


def test_another_objective_trains_other_weights(a_run, tmp_path):
    for objective in ("slots", "slots(anchors=3)", "slots(decay=0.5)", "slots(next_token=0)"):
        train(a_run("model.slots=3", f"training.objective='{objective}'"), tmp_path / objective)
    assert len({weights(each) for each in tmp_path.iterdir()}) == 4


def test_a_loss_that_is_not_finite_is_told_with_its_update(a_run, tmp_path):
    run = a_run("training.rate=1e30", "training.warmup=0", "training.clip=none", "training.checkpoint_every=1")
    with pytest.raises(UserError, match=r"The .* of update (\d+) is .*(nan|inf).*training\.rate") as told:
        train(run, tmp_path)
    done = len(log(tmp_path))
    assert f"update {done + 1} " in str(told.value)
    assert f"checkpoints/{done}." in str(told.value)
    assert all(math.isfinite(line["loss"]) for line in log(tmp_path))


@pytest.fixture
def explode_at(monkeypatch):
    """The gradient of some calls of clipping, counted from 1, becomes infinite."""
    clip = torch.nn.utils.clip_grad_norm_

    def arrange(*fatal):
        calls = []

        def explode(parameters, *arguments):
            parameters = list(parameters)
            calls.append(1)
            if len(calls) in fatal:
                parameters[0].grad.view(-1)[0] = math.inf
            return clip(parameters, *arguments)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", explode)

    return arrange


def test_a_gradient_that_is_not_finite_is_told_before_it_is_learned(a_run, tmp_path, explode_at):
    explode_at(3)
    with pytest.raises(UserError, match="update 3"):
        train(a_run("training.checkpoint_every=1", "training.updates=3"), tmp_path)
    assert all(each.isfinite().all() for each in lookfar.load(tmp_path).state_dict().values())


def test_updates_that_are_not_finite_are_passed_over_up_to_a_limit(a_run, tmp_path, explode_at):
    explode_at(3, 5, 6)
    run, notes = a_run("training.checkpoint_every=1", "training.updates=7", "training.skip_not_finite=2"), []
    with pytest.raises(
        UserError, match=r"gradient of update 6 is inf.*checkpoints/5\..* 2 such updates were passed over"
    ):
        train(run, tmp_path, lambda event: notes.append(event["text"]) if event["event"] == "note" else None)
    assert [note.split(" is ")[0] for note in notes] == ["The gradient of update 3", "The gradient of update 5"]
    assert all(note.endswith("It is passed over.") for note in notes)
    lines = [line for line in files.read_lines(tmp_path / "log.jsonl") if "norm" in line]
    assert [line["update"] for line in lines if line["norm"] is None] == [3, 5]
    explode_at(2)  # update 7: the two from before still count
    with pytest.raises(UserError, match=r"update 7.* 2 such updates"):
        train(run, tmp_path)
    explode_at()
    assert all(each.isfinite().all() for each in train(run, tmp_path).state_dict().values())


def test_an_update_that_is_passed_over_leaves_weights_and_optimizer_as_they_were(a_run, tmp_path, explode_at):
    explode_at(3)
    train(a_run("training.checkpoint_every=1", "training.keep=9", "training.skip_not_finite=1"), tmp_path)
    before, after = (torch.load(tmp_path / "checkpoints" / str(n) / "state.pt", weights_only=True) for n in (2, 3))
    assert weights(tmp_path, 2) == weights(tmp_path, 3) != weights(tmp_path, 4)
    assert [each["step"] for each in before["optimizer"]["state"].values()] == [
        each["step"] for each in after["optimizer"]["state"].values()
    ]


# Randomness


def test_one_seed_gives_one_model_to_the_byte_and_another_another(a_run, tmp_path):
    settings = "model.dropout=0.1", "model.scheme=kerple + dape_v2"
    torch.manual_seed(1)
    train(a_run(*settings), tmp_path / "one")
    torch.manual_seed(2)
    train(a_run(*settings), tmp_path / "again")
    train(a_run(*settings, "training.seed=1"), tmp_path / "other")
    assert weights(tmp_path / "one") == weights(tmp_path / "again") != weights(tmp_path / "other")
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("one", "again", "other")]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("seed", [2**24, 2**40, 2**62])
def test_any_seed_will_do(a_run, tmp_path, seed):
    train(a_run(f"training.seed={seed}"), tmp_path / "one")
    train(a_run(f"training.seed={seed + 1}"), tmp_path / "next")
    assert weights(tmp_path / "one") != weights(tmp_path / "next")


def test_training_draws_nothing_from_the_callers_generators(a_run, tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    run = a_run("model.dropout=0.3", "training.evaluate_every=1")
    train(run, tmp_path)
    train(run, tmp_path)  # read from the checkpoint
    with pytest.raises(UserError):
        train(a_run("training.rate=1e30", "training.warmup=0", "training.clip=none"), tmp_path / "broken")
    assert torch.equal(torch.get_rng_state(), state)


# The folder of a run


def test_a_checkpoint_holds_weights_state_and_their_hashes(a_run, tmp_path):
    train(a_run(), tmp_path)
    place = tmp_path / "checkpoints" / "4"
    assert sorted(each.name for each in place.iterdir()) == ["hashes.json", "model.safetensors", "state.pt"]
    hashes = json.loads((place / "hashes.json").read_text())
    assert hashes == {name: files.digest(place / name) for name in ("model.safetensors", "state.pt")}
    state = torch.load(place / "state.pt", weights_only=True)
    assert set(state) == {"optimizer", "accumulation", "random", "random_cuda", "seconds", "skipped"}
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"finished": 4, "last": 4}
    left = {each.name for each in tmp_path.iterdir()}
    assert left == {".lock", "checkpoints", "log.jsonl", "manifest.json", "rows.jsonl", "run.toml", "tokenizer.json"}
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_a_checkpoint_is_written_while_the_next_updates_are_computed(a_run, tmp_path, monkeypatch):
    write, later, told = checkpoint.save_file, Event(), []

    def slow(*arguments, **settings):
        told.append(later.wait(timeout=60))
        write(*arguments, **settings)

    def watch(event):
        if event["event"] == "update" and event["update"] == 3:
            assert checkpoint.updates(tmp_path / "slow") == []
            later.set()

    settings = "training.schedule=constant", "training.warmup=0"
    train(a_run(*settings, "training.updates=2"), tmp_path / "straight")
    monkeypatch.setattr(checkpoint, "save_file", slow)
    train(a_run(*settings, "training.checkpoint_every=2", "training.keep=9"), tmp_path / "slow", watch)
    assert told == [True, True]
    assert weights(tmp_path / "slow", 2) == weights(tmp_path / "straight") != weights(tmp_path / "slow", 4)


def test_the_recipe_in_the_folder_is_the_run(a_run, tmp_path):
    run = a_run('model.window=[4, "none"]', "training.clip=none", "model.layers=2")
    train(run, tmp_path)
    again, label = folder.read(tmp_path)
    assert again == run.model_copy(update={"model": run.model.model_copy(update={"vocabulary": 256})})
    assert label.startswith("text_file:book.txt@")
    versions = config.read_toml(tmp_path / "run.toml")["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["lookfar"] == lookfar.__version__
    train(again, tmp_path)  # it is the same run


@pytest.mark.parametrize(("every", "keep", "left"), [(2, 1, [7]), (2, 2, [6, 7]), (3, 9, [3, 6, 7]), (7, 1, [7])])
def test_the_last_checkpoints_are_kept(a_run, tmp_path, every, keep, left):
    train(a_run("training.updates=7", f"training.checkpoint_every={every}", f"training.keep={keep}"), tmp_path)
    assert checkpoint.updates(tmp_path) == left


def test_what_is_loaded_is_what_was_trained_and_ready_for_use(a_run, tmp_path):
    model = train(a_run("model.dropout=0.5", "model.scheme=kerple + dape_v2 + stable_mask"), tmp_path)
    loaded = lookfar.load(tmp_path)
    assert not loaded.training and not model.training
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert torch.equal(loaded(tokens()), loaded(tokens()))
    assert loaded.config == model.config


def test_a_checkpoint_is_loaded_by_its_number(a_run, tmp_path):
    model = train(a_run("training.checkpoint_every=2", "training.keep=2"), tmp_path)
    assert not torch.equal(lookfar.load(tmp_path, which=2)(tokens()), model(tokens()))
    assert torch.equal(lookfar.load(tmp_path, which=4)(tokens()), model(tokens()))
    assert torch.equal(lookfar.load(tmp_path, which="2")(tokens()), lookfar.load(tmp_path, which=2)(tokens()))
    train(a_run("training.updates=2", "training.schedule=cosine"), tmp_path / "short")
    with pytest.raises(UserError, match=r"has no whole checkpoint 3; it has: \[2, 4\]"):
        lookfar.load(tmp_path, which=3)
    with pytest.raises(UserError, match="'lst'"):
        lookfar.load(tmp_path, which="lst")
    with pytest.raises(UserError, match="best"):
        lookfar.load(tmp_path, which="best")  # nothing was held out


def test_the_best_checkpoint_has_the_lowest_held_out_loss(a_run, tmp_path, monkeypatch):
    scripted = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(Perplexity, "measure", lambda *a, **s: [{"metric": "loss", "value": next(scripted)}])
    model = train(a_run("training.evaluate_every=1", "training.checkpoint_every=1"), tmp_path)
    assert checkpoint.updates(tmp_path) == [2, 4]  # the best and the last
    best = lookfar.load(tmp_path, which="best")
    assert torch.equal(best(tokens()), lookfar.load(tmp_path, which=2)(tokens()))
    assert not torch.equal(best(tokens()), model(tokens()))


def test_a_folder_without_a_run_or_checkpoint_is_told(a_run, tmp_path):
    with pytest.raises(UserError, match=r"is not a run's folder: it has no run\.toml"):
        lookfar.load(tmp_path)
    folder.settle(tmp_path, a_run("model.vocabulary=256"), "label")
    with pytest.raises(UserError, match="has no whole checkpoint 'last'; it has: none"):
        lookfar.load(tmp_path)


def test_weights_may_be_loaded_under_another_scheme_that_they_fit(a_run, tmp_path):
    train(a_run(), tmp_path)
    assert lookfar.load(tmp_path, scheme="nope").config.scheme == "nope"
    with pytest.raises(UserError, match="do not fit the scheme 'kerple'"):
        lookfar.load(tmp_path, scheme="kerple")


OWN = """
import pathlib
from lookfar.data.base import Document, Source
from lookfar.methods.base import InputEncoding

pathlib.Path(__file__).with_name("was_run").touch()


class {name}({base}):
    def encode(self, x, positions):
        return x

    def documents(self, split):
        yield Document("one", "text " * 90)
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A package of somebody else, and whether its code has run."""
    package = tmp_path / "modules" / "somebodys"
    package.mkdir(parents=True)
    (package / "trick.py").write_text(OWN.format(name="Trick", base="InputEncoding"))
    corpus = OWN.format(name="Corpus", base="Source").replace(
        "def encode", "def __init__(self, *, path=None):\n        pass\n\n    def encode"
    )
    (package / "corpus.py").write_text(corpus)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield (package / "was_run").exists
    for name in [name for name in sys.modules if name.split(".")[0] == "somebodys"]:
        del sys.modules[name]


def rewrite(place, old, new):
    recipe = (place / "run.toml").read_text()
    assert old in recipe
    (place / "run.toml").write_text(recipe.replace(old, new))


@pytest.mark.parametrize("scheme", ['"somebodys.trick"', '["alibi", "nope + somebodys.trick"]'])
def test_a_foreign_scheme_is_not_run_without_trust(a_run, tmp_path, foreign, scheme):
    train(a_run("model.scheme=nope", "model.layers=2"), tmp_path / "run")
    rewrite(tmp_path / "run", 'scheme = "nope"', f"scheme = {scheme}")
    for use in (lookfar.load, evaluate_run):
        with pytest.raises(UserError, match=r"would execute the code of 'somebodys\.trick'; allow it with trust=True"):
            use(tmp_path / "run")
    assert not foreign()
    assert isinstance(lookfar.load(tmp_path / "run", trust=True), Decoder)
    assert foreign()


def test_a_foreign_source_of_text_is_not_run_without_trust(a_run, tmp_path, foreign):
    train(a_run(), tmp_path / "run")
    rewrite(tmp_path / "run", 'source = "text_file"', 'source = "somebodys.corpus"')
    with pytest.raises(UserError, match=r"would execute the code of 'somebodys\.corpus'; allow it with trust=True"):
        evaluate_run(tmp_path / "run")
    assert not foreign()
    evaluate_run(tmp_path / "run", trust=True)
    assert foreign()


def test_a_folder_is_worked_in_by_one_at_a_time(a_run, tmp_path):
    with (
        folder.claim(tmp_path),
        pytest.raises(UserError, match=r"Another process works in .*; wait for it, or choose another folder"),
    ):
        train(a_run(), tmp_path)
    train(a_run(), tmp_path)


def test_a_second_process_in_a_folder_is_told(a_run, tmp_path):
    hold = (
        "import sys, pathlib; from lookfar.training.folder import claim\n"
        "with claim(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for use in (lambda: train(a_run(), tmp_path), lambda: run_whole(a_run(), tmp_path)):
            with pytest.raises(UserError, match="Another process works in"):
                use()
        assert [each.name for each in tmp_path.iterdir()] == [".lock"]
        other.kill()
    train(a_run(), tmp_path)  # a process that is gone holds nothing


def test_a_run_is_refused_at_the_door_and_leaves_nothing(a_run, tmp_path):
    for wrong in (
        ["model.scheme=alibbi"],
        ["model.scheme=learned"],  # evaluated beyond its table
        ["model.scheme=differential", "model.heads=1", "model.head_width=16"],
        ['model.scheme=["sinusoidal", "learned"]', "model.layers=2", "model.positions=16"],
        ["model.device=nowhere"],
        ["training.numbering=nowhere"],
        ["model.vocabulary=100"],
        ["model.context=5000"],
        ["data.path=nowhere.txt"],
        ["data.source=nowhere"],
        ['evaluation.protocols=["sliding(stride=9)"]'],
    ):
        with pytest.raises(UserError):
            run_whole(a_run(*wrong), tmp_path / "run")
        assert not (tmp_path / "run").exists(), wrong


# Measuring


def test_rows_say_what_was_measured_of_what(a_run, tmp_path):
    rows = run_whole(a_run("training.seed=7"), tmp_path / "mine")
    assert rows == files.read_lines(tmp_path / "mine" / "rows.jsonl")
    assert {(row["run"], row["scheme"], row["seed"], row["context"]) for row in rows} == {("mine", "alibi", 7, 8)}
    assert len({row["data"] for row in rows}) == 1
    measured = {(row["protocol"], row["length"], row["metric"]) for row in rows if row["protocol"] != "training"}
    metrics = ("loss", "perplexity", "bits_per_byte", "word_perplexity")
    assert measured == {(p, n, m) for p in ("non_overlapping", "sliding") for n in (8, 16) for m in metrics}
    assert {row["count"] for row in rows if row["protocol"] != "training"} == {64}
    trained = {row["metric"]: row["value"] for row in rows if row["protocol"] == "training"}
    assert set(trained) == {"parameters", "training_seconds", "tokens_per_second"}
    assert trained["parameters"] == sum(each.numel() for each in lookfar.load(tmp_path / "mine").parameters())
    assert trained["tokens_per_second"] * trained["training_seconds"] == pytest.approx(4 * 4 * 8)


def test_what_is_measured_is_not_measured_again(a_run, tmp_path, monkeypatch):
    rows = run_whole(a_run(), tmp_path)
    monkeypatch.setattr(Perplexity, "measure", None)
    assert run_whole(a_run(), tmp_path) == rows
    assert values(evaluate_run(tmp_path)) == values(rows)


def test_a_protocol_may_set_its_own_cap(a_run, tmp_path):
    rows = run_whole(a_run('evaluation.protocols=["sliding(tokens=40)", "non_overlapping"]'), tmp_path)
    counts = {row["protocol"]: row["count"] for row in rows}
    assert counts["sliding"] == 40 and counts["non_overlapping"] == 64


def test_the_split_that_is_named_is_measured(a_run, tmp_path):
    train(a_run(), tmp_path / "one")
    valid = values(evaluate_run(tmp_path / "one"))
    train(a_run("evaluation.split=test"), tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    test = values(evaluate_run(tmp_path / "two"))
    assert test.keys() == valid.keys() and test != valid
    changed = run_whole(a_run("evaluation.split=test"), tmp_path / "one")  # a folder that has the other's rows
    assert values(changed) == test
    labels = {row["data"] for row in files.read_lines(tmp_path / "one" / "rows.jsonl") if row["metric"] == "perplexity"}
    assert len(labels) == 2 and {label.endswith(", test") for label in labels} == {True, False}


def test_a_run_is_measured_at_other_lengths_in_other_protocols(a_run, tmp_path):
    before = run_whole(a_run(), tmp_path)
    rows = evaluate_run(tmp_path, lengths=[4, 8], wanted=["sliding(stride=2)"], tokens=32)
    assert set(values(rows)) == {("sliding(stride=2)", 4), ("sliding(stride=2)", 8)}
    assert {row["count"] for row in rows} == {32}
    after = files.read_lines(tmp_path / "rows.jsonl")
    assert after[: len(before)] == before and after[len(before) :] == rows


def test_a_run_is_measured_under_another_scheme(a_run, tmp_path):
    own = run_whole(a_run(), tmp_path)
    other = evaluate_run(tmp_path, scheme="nope")
    assert {row["scheme"] for row in other} == {"nope"}
    assert set(values(other)) == set(values(own))
    assert all(values(other)[key] != value for key, value in values(own).items())
    assert values(evaluate_run(tmp_path)) == values(own)  # both are in the folder


def test_a_file_of_n_bytes_has_n_minus_1_tokens_to_predict(a_run, tmp_path):
    train(a_run(), tmp_path / "run")
    (tmp_path / "other.txt").write_text("Ünlike it.\n" * 9, encoding="utf-8")
    rows = evaluate_run(tmp_path / "run", data=tmp_path / "other.txt", tokens=10_000)
    assert {row["count"] for row in rows} == {12 * 9 - 1}
    digest = hashlib.sha256((tmp_path / "other.txt").read_bytes()).hexdigest()
    assert {row["data"] for row in rows} == {f"other.txt@{digest[:8]}"}


def test_a_run_that_goes_on_is_measured_anew(a_run, tmp_path):
    settings = "training.schedule=constant", "training.warmup=0", "training.rate=0.01"
    short = run_whole(a_run(*settings, "training.updates=2"), tmp_path)
    longer = run_whole(a_run(*settings, "training.updates=20"), tmp_path)  # a constant rate may go on
    assert all(longer_value < values(short)[key] for key, longer_value in values(longer).items())
    fresh = run_whole(a_run(*settings, "training.updates=20"), tmp_path.with_name("fresh"))
    assert values(longer) == values(fresh)
    assert folder.read(tmp_path)[0].training.updates == 20
    assert len([row for row in longer if row["metric"] == "parameters"]) == 1


# Precision


@pytest.mark.parametrize(
    ("wanted", "dtype", "mixed"),
    [("bfloat16", "float32", True), ("float32", "float32", False), ("bfloat16", "float64", False)],
)
def test_products_are_in_bfloat16_only_where_asked(wanted, dtype, mixed):
    with precision.autocast(wanted, dtype, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == mixed


@pytest.mark.parametrize("fast", [True, False])
def test_auto_takes_bfloat16_where_the_processor_is_fast_at_it(monkeypatch, fast):
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: fast)
    with precision.autocast("auto", "float32", torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == fast
