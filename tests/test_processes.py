"""Several processes train what one trains: every method, whole or sharded, and go on with what any number left."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

import lookfar
from lookfar import config, files
from lookfar.config import Run
from lookfar.errors import UserError
from lookfar.methods.base import Method
from lookfar.model.decoder import Decoder
from lookfar.training import checkpoint, distributed_checkpoint, objectives, optimizers, sharding
from lookfar.training import folder as run_folder
from lookfar.training.evaluate import evaluate_run
from lookfar.training.export import export
from lookfar.training.processes import Processes, check
from lookfar.training.run import run_whole
from lookfar.training.saving import Saver
from lookfar.training.train import Interrupted, train
from tolerance import assert_near

NEAR, UPDATES = 1e-5, 20
METHODS = [*lookfar.names("methods"), "kerple + dape_v2 + stable_mask", "differential(share_bias=true) + t5"]
SLOTS = "model.slots=3", "training.objective=slots(anchors=4)", "model.slot_embeddings=own"
CASES = {each: (f"model.scheme={each}",) for each in METHODS} | {
    "isolated": ("data.documents=isolated", "model.scheme=fire"),
    "numbered": ("training.numbering=randomized(largest=40)", "model.scheme=t5"),
    "slots": (*SLOTS, "model.scheme=alibi"),
    "untied": ("model.tied=false", "training.accumulation=2", "training.evaluate_every=7", "model.dtype=float64"),
    "recomputed": ("training.checkpoint_activations=true", "model.scheme=cope"),
}
SHARDED = ["kerple", "slots", "untied"]
SHARDED_TOO = [each for each in CASES if each not in SHARDED]  # slower: a second launch, with the long tests
SHARDS = "model.scheme=kerple + t5", "training.parallel=sharded", "model.width=14", "model.vocabulary=257"  # odd parts
CONTENT = {
    "model": {"width": 12, "layers": 2, "heads": 2, "context": 9, "dtype": "float64", "device": "cpu"},
    "training": {"updates": UPDATES, "batch": 4, "rate": 5e-3, "checkpoint_every": 10, "keep": 9},
    "evaluation": {"lengths": [9], "tokens": 20},
}


def a_run(book, *overrides):
    data = {"source": "text_file", "path": str(book)}
    return config.build({**CONTENT, "data": data}, ["model.scheme=kerple", *overrides])


def losses(place):
    return [line["loss"] for line in files.read_lines(place / "log.jsonl") if "loss" in line]


def weights(place, update=UPDATES):
    return checkpoint.read_weights(place / "checkpoints" / str(update))


def optimizer_of(place, update=UPDATES):
    """The state of the optimizer of one process that goes on from a checkpoint."""
    run, _ = run_folder.read(place)
    model = Decoder(run.model)
    state = checkpoint.restore(place, update, model)
    optimizer = optimizers.build(model, run.training)
    optimizers.go_on(optimizer, state["optimizer"])
    return optimizer.state_dict()


def assert_same(place, other, update=UPDATES):
    """The same losses and weights, up to the order of sums."""
    assert len(losses(place)) == len(losses(other)) == update
    assert losses(place) == pytest.approx(losses(other), abs=NEAR)
    one, two = weights(place, update), weights(other, update)
    assert one.keys() == two.keys()
    for name, each in one.items():
        assert (each - two[name]).abs().max() < 1e-4, name


# What two processes do, in one launch; a file for each rank tells what it saw


def stop_after(update, event):
    if event["event"] == "update" and event["update"] == update:
        os.kill(os.getpid(), signal.SIGTERM)


def told_by(function):
    """The sentence with which a function refuses, or the number of updates at which it was interrupted."""
    try:
        function()
    except UserError as error:
        return str(error)
    except Interrupted as stop:
        return [stop.update, stop.signal]
    return None


def two_processes(rank, place, book):
    """Everything that the tests below look at, but for most of the sharded models."""
    told = sharded(place, book, SHARDED)
    for name, settings in CASES.items():
        train(a_run(book, *settings), place / "replicated" / name)
    for parallel in ("replicated", "sharded"):
        run = a_run(book, f"training.parallel={parallel}")
        watch = partial(stop_after, 7) if rank == 1 else lambda event: None
        told[f"stop {parallel}"] = told_by(
            lambda run=run, watch=watch, p=parallel: train(run, place / f"stop {p}", watch)
        )
        train(run, place / f"again {parallel}", lambda event: None)
        told[f"one to two {parallel}"] = told_by(lambda run=run, p=parallel: train(run, place / f"one to two {p}"))
    told["batch"] = told_by(lambda: train(a_run(book, "training.batch=9"), place / "batch"))
    told["explode"] = told_by(lambda: train(a_run(book, "training.rate=1e300", "training.warmup=0"), place / "explode"))
    (place / "file").write_text("in the way")
    told["folder"] = told_by(lambda: train(a_run(book), place / "file" / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save", save_both(place))
        train(a_run(book, *SHARDS), place / "shards")
    told["stop in parts"] = told_by(lambda: train(a_run(book, *SHARDS), place / "again", partial(stop_after, 7)))
    train(a_run(book, *SHARDS), place / "again")
    for _ in range(2):  # it is loaded, too
        train(a_run(book, *SHARDS, "training.updates=0", "model.dtype=bfloat16"), place / "fresh")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter, "write_data", fill_the_disk(rank))
        told["full"] = told_by(lambda: train(a_run(book, *SHARDS), place / "full"))
    told["halve"] = out_of_memory(rank, place, book, "halve")
    told["stop"] = out_of_memory(rank, place, book, "stop")
    told["narrow"] = narrow(place, book)
    (place / f"{rank}.json").write_text(json.dumps(told))


def save_both(place):
    """Save, and write what the shards hold into a plain checkpoint of another folder too."""
    save = Saver.save

    def both(saver, update, model, optimizer, progress, better=None):
        first, state = saver.processes.first, optimizer.state_dict()
        whole = sharding.gathered(model)
        state["state"] = {
            number: {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in values.items()}
            for number, values in state["state"].items()
        }
        random = {"random": torch.get_rng_state(), "random_cuda": None}
        if first:
            checkpoint.save(
                place / "plain", update, checkpoint.weights(whole), {"optimizer": state, **random, **progress}
            )
        save(saver, update, model, optimizer, progress, better)

    return both


def fill_the_disk(rank):
    """Let the disk of the second process be full at its second checkpoint."""
    write, asked = HuggingFaceStorageWriter.write_data, []

    def limited(writer, plan, planner):
        asked.append(plan)
        if rank == 1 and len(asked) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(writer, plan, planner)

    return limited


def killed_while_saving(place, book):
    """Both processes die once the shards of the second checkpoint are written."""
    found, asked = distributed_checkpoint.hashes, []

    def fatal(folder, rank):
        asked.append(folder)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return found(folder, rank)

    distributed_checkpoint.hashes = fatal
    train(a_run(book, *SHARDS), place / "killed")


def sharded(place, book, names):
    """Train these cases in parts; the answer is what came of the models."""
    runs = {name: a_run(book, *CASES[name], "training.parallel=sharded") for name in names}
    return {f"sharded {name}": type(train(run, place / "sharded" / name)).__name__ for name, run in runs.items()}


def out_of_memory(rank, place, book, what):
    """The second process has no room for two lines."""
    found, asked = objectives.next_token, []

    def limited(model, lines, *rest):
        asked.append(len(lines))
        if rank == 1 and len(lines) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return found(model, lines, *rest)

    objectives.next_token = objectives.OBJECTIVES["next_token"] = limited
    try:
        run = a_run(book, f"training.on_out_of_memory={what}", "training.updates=2", "training.warmup=1")
        return [told_by(lambda: train(run, place / f"memory {what}")), asked]
    finally:
        objectives.next_token = objectives.OBJECTIVES["next_token"] = found


def narrow(place, book):
    """The types of what methods learn, and of the rest, after training in bfloat16."""
    settings = "model.dtype=bfloat16", "model.scheme=kerple + learned", "training.parallel=sharded"
    model = train(a_run(book, *settings, "training.updates=2"), place / "narrow")
    own = {id(each) for method in model.modules() if isinstance(method, Method) for each in method.parameters()}
    return sorted({f"{id(each) in own} {each.dtype}" for each in model.parameters()})


def launch(place, book, *more):
    """Start this file twice, as two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(place), str(book), *more],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]


def wait_for(started):
    for each in started:
        output, _ = each.communicate(timeout=600)
        assert each.returncode == 0, output


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    file = tmp_path_factory.mktemp("book") / "book.txt"
    file.write_text("".join(f"{n * n} is the square of {n}, {n}\n\n" for n in range(60)))
    return file


@pytest.fixture(scope="module")
def place(book, tmp_path_factory):
    """The folders of all runs; one process trains while two do."""
    place = tmp_path_factory.mktemp("runs")
    for parallel in ("replicated", "sharded"):
        with pytest.raises(Interrupted):
            train(a_run(book), place / f"one to two {parallel}", partial(stop_after, 7))
    started = launch(place, book)
    for name, settings in CASES.items():
        train(a_run(book, *settings), place / "one" / name)
    wait_for(started)
    for name in ("run.toml", "tokenizer.json"):
        shutil.copy(place / "shards" / name, place / "plain" / name)
    return place


@pytest.fixture(scope="module")
def place_of_more(place, book):
    """The same with the sharded models that are left."""
    wait_for(launch(place, book, *SHARDED_TOO))
    return place


@pytest.fixture
def told(place):
    return [json.loads((place / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_trains(place, name):
    assert_same(place / "replicated" / name, place / "one" / name)


@pytest.mark.parametrize("name", SHARDED)
def test_two_processes_with_parts_of_a_model_train_what_one_trains(place, told, name):
    assert_same(place / "sharded" / name, place / "one" / name)
    assert all(each[f"sharded {name}"] == "Decoder" for each in told)


@pytest.mark.long
@pytest.mark.parametrize("name", SHARDED_TOO)
def test_two_processes_with_parts_of_any_model_train_what_one_trains(place_of_more, name):
    assert_same(place_of_more / "sharded" / name, place_of_more / "one" / name)


def test_the_held_out_loss_is_the_same(place):
    lines = [
        [line["valid_loss"] for line in files.read_lines(place / kind / "untied" / "log.jsonl") if "valid_loss" in line]
        for kind in ("one", "replicated", "sharded")
    ]
    assert len(lines[0]) == 2
    assert all(each == pytest.approx(lines[0], abs=NEAR) for each in lines)
    assert checkpoint.read_manifest(place / "sharded" / "untied")["best"] in (7, 14)


def test_recomputed_activations_give_the_same_bytes(place):
    plain, again = weights(place / "one" / "cope"), weights(place / "one" / "recomputed")
    assert all(torch.equal(each, again[name]) for name, each in plain.items())


@pytest.mark.parametrize("parallel", ["replicated", "sharded"])
def test_a_signal_to_one_process_stops_all_after_the_same_update(place, told, parallel):
    assert [each[f"stop {parallel}"] for each in told] == [[7, signal.SIGTERM]] * 2
    assert checkpoint.updates(place / f"stop {parallel}") == [7]


@pytest.mark.parametrize("parallel", ["replicated", "sharded"])
def test_one_process_goes_on_with_what_two_left(place, book, parallel):
    train(a_run(book), place / f"stop {parallel}")
    assert_same(place / f"stop {parallel}", place / "one" / "kerple")


@pytest.mark.parametrize("parallel", ["replicated", "sharded"])
def test_two_processes_go_on_with_what_one_left(place, parallel):
    assert_same(place / f"one to two {parallel}", place / "one" / "kerple")


def test_a_checkpoint_does_not_tell_how_many_wrote_it(place):
    one, *others = (optimizer_of(place / kind / "kerple") for kind in ("one", "replicated", "sharded"))
    for other in others:
        assert [group["params"] for group in one["param_groups"]] == [g["params"] for g in other["param_groups"]]
        assert one["param_groups"][0]["lr"] == other["param_groups"][0]["lr"]
        for number, values in one["state"].items():
            for key, value in values.items():
                assert type(other["state"][number][key]) is torch.Tensor
                assert_near(other["state"][number][key].float(), value.float(), f"{number} {key}")


# Checkpoints in shards


def test_every_process_writes_its_shards_alone(place):
    names = {each.name for each in (place / "shards" / "checkpoints" / "20").iterdir()}
    shards = {f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)}
    assert names == {*shards, checkpoint.STATE, checkpoint.HASHES}
    assert json.loads((place / "shards" / "checkpoints" / "20" / checkpoint.HASHES).read_text()).keys() == {
        *shards,
        checkpoint.STATE,
    }
    assert "optimizer.0.exp_avg" in load_file(place / "shards" / "checkpoints" / "20" / max(shards))


@pytest.mark.parametrize("update", [10, 20])
def test_shards_hold_the_bytes_of_a_plain_checkpoint(place, update):
    shards, plain = weights(place / "shards", update), weights(place / "plain", update)
    assert shards.keys() == plain.keys()
    assert all(torch.equal(each, plain[name]) and each.dtype == plain[name].dtype for name, each in shards.items())
    shards, plain = optimizer_of(place / "shards", update), optimizer_of(place / "plain", update)
    assert shards["param_groups"] == plain["param_groups"] and shards["state"].keys() == plain["state"].keys()
    for number, values in plain["state"].items():
        assert all(torch.equal(each, shards["state"][number][key]) for key, each in values.items())
        assert values["exp_avg"].abs().sum() > 0


def test_two_processes_go_on_exactly_with_what_two_left(place, told):
    assert [each["stop in parts"] for each in told] == [[7, signal.SIGTERM]] * 2
    assert losses(place / "again") == losses(place / "shards")
    assert all(torch.equal(each, weights(place / "shards")[name]) for name, each in weights(place / "again").items())


def test_one_process_goes_on_with_shards_as_with_a_plain_checkpoint(place, book, tmp_path):
    for kind in ("shards", "plain"):
        branch = f"training.branch={place / kind}@10"
        train(a_run(book, *SHARDS, branch, "training.schedule=constant", "training.warmup=0"), tmp_path / kind)
        train(a_run(book, *SHARDS, f"training.weights={place / kind}@10"), tmp_path / f"tuned {kind}")
    for name in ("", "tuned "):
        assert losses(tmp_path / f"{name}shards") == losses(tmp_path / f"{name}plain")
        assert (tmp_path / f"{name}shards" / "checkpoints" / "20" / checkpoint.WEIGHTS).exists()
        assert all(
            map(torch.equal, weights(tmp_path / f"{name}shards").values(), weights(tmp_path / f"{name}plain").values())
        )


def test_a_run_in_shards_is_used_as_any_other(place, tmp_path):
    shards, plain = (lookfar.load(place / kind) for kind in ("shards", "plain"))
    assert all(map(torch.equal, shards.parameters(), plain.parameters()))
    assert lookfar.generate(shards, [[1, 2]], tokens=4) == lookfar.generate(plain, [[1, 2]], tokens=4)
    shutil.copytree(place / "shards", tmp_path / "run")
    assert evaluate_run(tmp_path / "run", lengths=[9])
    with pytest.raises(UserError, match=r"do not fit the scheme 'alibi': other names or shapes: .*methods"):
        lookfar.load(place / "shards", scheme="alibi")


def test_shards_of_a_narrow_model_that_has_learned_nothing_are_loaded(place, book, tmp_path):
    train(a_run(book, *SHARDS, "training.updates=0", "model.dtype=bfloat16"), tmp_path)
    shards, plain = weights(place / "fresh", 0), weights(tmp_path, 0)
    assert {each.dtype for each in shards.values()} == {torch.bfloat16, torch.float32}
    assert shards.keys() == plain.keys() and all(torch.equal(each, plain[name]) for name, each in shards.items())
    assert all(map(torch.equal, lookfar.load(place / "fresh").parameters(), lookfar.load(tmp_path).parameters()))


def test_the_export_of_shards_is_the_file_of_a_plain_checkpoint(place, tmp_path):
    plain = place / "plain" / "checkpoints"
    for which, update in (("last", 20), (10, 10)):
        for kind in ("shards", "plain"):
            file = export(place / kind, tmp_path / kind / f"{which}.safetensors", which=which)
            assert file.read_bytes() == (plain / str(update) / checkpoint.WEIGHTS).read_bytes()


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda file: file.write_bytes(b"")], ids=["bit", "lost", "empty"]
)
@pytest.mark.parametrize("file", ["shard-00001", "shard-00002", checkpoint.STATE, checkpoint.HASHES])
def test_a_damaged_shard_is_named_and_its_checkpoint_passed_over(place, tmp_path, file, damage):
    shutil.copytree(place / "shards", tmp_path / "run")
    (damaged,) = (tmp_path / "run" / "checkpoints" / "20").glob(f"{file}*")
    damage(damaged)
    name = "" if file == checkpoint.HASHES else file
    with pytest.warns(UserWarning, match=rf"checkpoints/20 is damaged: .*{name}.*It is passed over"):
        assert checkpoint.newest(tmp_path / "run") == 10
    with pytest.raises(UserError, match=r"checkpoints/20 is damaged"):
        lookfar.load(tmp_path / "run", which=20)


def test_a_process_that_cannot_write_its_shards_stops_all_and_harms_no_earlier_checkpoint(place, told):
    for each in told:
        assert "checkpoint of update 20 could not be written" in each["full"] and "No space left" in each["full"]
    assert [each.name for each in (place / "full" / "checkpoints").iterdir()] == ["10"]
    assert checkpoint.newest(place / "full") == 10


def test_processes_that_are_killed_while_they_save_lose_nothing_published(place, book):
    for each in launch(place, book, "killed"):
        each.communicate(timeout=600)
        assert each.returncode == -signal.SIGKILL
    published = place / "killed" / "checkpoints"
    (aside,) = published.glob(".20-*")
    assert len(list(aside.glob("shard-*"))) == 2
    assert checkpoint.updates(place / "killed") == [10] and checkpoint.newest(place / "killed") == 10
    train(a_run(book, *SHARDS), place / "killed")
    assert {each.name for each in published.iterdir()} == {"10", "20"}
    assert [(published / each / checkpoint.WEIGHTS).exists() for each in ("10", "20")] == [False, True]
    assert_same(place / "killed", place / "shards")


def test_what_all_refuse_is_one_sentence(told):
    for each in told:
        assert each["batch"] == (
            "training.batch (9) must divide by processes × training.accumulation (2 × 1); "
            "try training.batch=10, or another number of processes."
        )
        assert each["explode"].startswith("The ") and "of update" in each["explode"]
        assert "cannot be written" in each["folder"]
    assert told[0]["explode"] == told[1]["explode"]


def test_all_take_smaller_pieces_where_one_must(place, told):
    assert [each["halve"] for each in told] == [[None, [2, 1, 1, 1, 1]]] * 2
    assert losses(place / "memory halve") == pytest.approx(losses(place / "one" / "kerple")[:2], abs=NEAR)
    assert all("ran out of memory at 2 × 9 tokens" in each["stop"][0] for each in told)


def test_what_methods_learn_stays_wide_in_a_sharded_model(told):
    assert [each["narrow"] for each in told] == [["False torch.bfloat16", "True torch.float32"]] * 2


# At the door


@pytest.mark.parametrize(
    ("settings", "count", "sentence"),
    [
        (("training.accumulation=3", "training.batch=6"), 4, r"\(6\) must divide .* \(4 × 3\); try training\.batch=12"),
        (("training.optimizer=muon", "training.parallel=sharded"), 1, "needs whole matrices"),
        (("training.on_out_of_memory=halve", "training.parallel=sharded"), 2, r"choose training\.accumulation=2 "),
    ],
)
def test_a_run_that_so_many_cannot_share_is_refused(settings, count, sentence):
    with pytest.raises(UserError, match=sentence):
        check(config.build({}, settings), Processes(0, count))


def test_one_process_may_share_anything_else():
    check(Run(), Processes())


@pytest.fixture
def torchrun(tmp_path, book, request):
    """A recipe, and the command that trains it in two processes."""
    run = a_run(book, "training.updates=4000", "training.checkpoint_every=5", "training.keep=2")
    run = config.build(run.model_dump(), [f"training.parallel={getattr(request, 'param', 'replicated')}"])
    (tmp_path / "small.toml").write_text(config.write_toml(run.model_dump()))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*start, "-m", "lookfar", "train", str(tmp_path / "small.toml"), "--folder", str(tmp_path / "run")]


@pytest.mark.long
@pytest.mark.parametrize("torchrun", ["replicated", "sharded"], indirect=True)
def test_a_run_whose_processes_are_killed_goes_on_with_one(torchrun, book, tmp_path):
    place, end = tmp_path / "run", time.monotonic() + 120
    with subprocess.Popen(torchrun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ran:
        while not checkpoint.updates(place):
            assert time.monotonic() < end and ran.poll() is None
            time.sleep(0.05)
        for each in _children(ran.pid):
            os.kill(each, signal.SIGKILL)
        ran.communicate(timeout=120)
    done = checkpoint.newest(place)
    assert done is not None and done < 4000
    run = a_run(book, "training.updates=4000", "training.checkpoint_every=5", "training.keep=2")
    for each in (place, tmp_path / "straight"):
        with pytest.raises(Interrupted):
            run_whole(run, each, partial(stop_after, done + 12))
    assert_same(place, tmp_path / "straight", done + 12)


@pytest.mark.long
def test_the_command_writes_once_and_tells_once(torchrun, tmp_path):
    torchrun += ["--set", "training.updates=5"]
    ran = subprocess.run(torchrun, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("The run is in") == 1 and ran.stderr.count("parameters, 5 updates") == 1
    assert len(losses(tmp_path / "run")) == 5 and (tmp_path / "run" / "rows.jsonl").exists()


def _children(parent):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=True)
    return list(map(int, found.stdout.split()))


if __name__ == "__main__":
    from torch import distributed

    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    own, text, *names = sys.argv[1:]
    if names == ["killed"]:
        killed_while_saving(Path(own), Path(text))
    elif names:
        sharded(Path(own), Path(text), names)
    else:
        two_processes(distributed.get_rank(), Path(own), Path(text))
    distributed.destroy_process_group()
