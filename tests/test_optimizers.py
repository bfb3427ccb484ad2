"""Optimizers: which parameters each takes, which of them decay, and that all go on exactly."""

import pytest
import torch

import lookfar
from lookfar import config
from lookfar.config import ModelConfig, TrainingConfig
from lookfar.model.decoder import Decoder
from lookfar.training import checkpoint, optimizers
from lookfar.training.train import train

PLAIN = {"attention.project.weight", "attention.output.weight", "feed_forward.up.weight", "feed_forward.down.weight"}
OWN = {  # of each method: what decays, and what does not
    "alibi": ("", ""),
    "cope": ("", "embedding"),
    "dape_v1": ("first.weight second.weight", "first.bias second.bias"),
    "dape_v2": ("first.weight second.weight", "first.bias second.bias"),
    "differential": ("", "vectors weight"),
    "differential_v2": ("balance.weight", ""),
    "fire": ("first.weight second.weight", "first.bias second.bias rate stretch"),
    "gate": ("project.weight", ""),
    "kerple": ("", "amplitude rate"),
    "learned": ("", "table"),
    "learned_sink": ("", "value"),
    "log_n": ("", ""),
    "rope": ("", ""),
    "sinusoidal": ("", ""),
    "stable_mask": ("", ""),
    "t5": ("", "table"),
    "transformer_xl": ("project.weight", "content place"),
}


def build(method, name="adamw", **changes):
    """A decoder, and its optimizer's groups as sets of the names of parameters."""
    sizes = {"vocabulary": 9, "width": 16, "layers": 1, "heads": 2, "context": 8, "qk_norm": True, "device": "cpu"}
    model = Decoder(ModelConfig(**{**sizes, "scheme": method, **changes}))
    built = optimizers.build(model, TrainingConfig(optimizer=name, weight_decay=0.3, rate=0.7))
    names = {id(parameter): name.removeprefix("blocks.0.") for name, parameter in model.named_parameters()}
    groups = [{names[id(each)] for each in group["params"]} for group in built.param_groups]
    assert sum(len(group) for group in groups) == len(names) and set().union(*groups) == set(names.values())
    return built, groups


def own(words):
    return {f"attention.scheme.methods.0.{word}" for word in words.split()}


@pytest.mark.parametrize("method", lookfar.names("methods"))
def test_of_every_method_only_weights_of_linear_and_conv_decay(method):
    decayed, free = OWN[method]
    built, groups = build(method)
    norms = {"attention_norm.weight", "feed_forward_norm.weight", "norm.weight"}
    norms |= {"attention.query_norm.weight", "attention.key_norm.weight"}
    assert groups == [PLAIN | own(decayed), norms | {"embedding.weight"} | own(free)]
    assert [group["weight_decay"] for group in built.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("method", lookfar.names("methods"))
def test_muon_takes_the_matrices_between_hidden_states_and_adamw_all_else(method):
    decayed, free = OWN[method]
    built, groups = build(method, "muon", tied=False)
    rest = own(decayed) | {"head.weight"}
    assert groups[:2] == [PLAIN, rest] and own(free) | {"embedding.weight"} <= groups[2]
    assert [type(each).__name__ for each in built.optimizers.values()] == ["Muon", "AdamW"]
    assert [group["weight_decay"] for group in built.param_groups] == [0.3, 0.3, 0.0]
    assert all(group["lr"] == 0.7 for group in built.param_groups)


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    """The root mean square of AdamW's steps is between 0.2 and 0.4 of the rate; Muon's is brought to 0.2."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocabulary=99, width=32, layers=1, heads=2, context=8, device="cpu"))
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    built = optimizers.build(model, TrainingConfig(optimizer="muon", weight_decay=0, rate=0.01))
    model(torch.randint(0, 99, (16, 8))).square().sum().backward()
    built.step()
    for name in PLAIN:
        name = f"blocks.0.{name}"
        moved = (model.get_parameter(name) - before[name]).square().mean().sqrt().item()
        assert 0.1 < moved / 0.01 < 0.3
    built.zero_grad()
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_exactly(optimizer, tmp_path):
    (tmp_path / "book.txt").write_text("to be or not to be, that is the question. " * 90)
    content = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 8, "scheme": "kerple", "device": "cpu"},
        "data": {"source": "text_file", "path": str(tmp_path / "book.txt")},
        "training": {"batch": 4, "precision": "float32", "schedule": "constant", "warmup": 1, "optimizer": optimizer},
    }
    for place, updates in (("whole", 6), ("parts", 2), ("parts", 6)):
        train(config.build(content, [f"training.updates={updates}"]), tmp_path / place)
    whole, parts = (tmp_path / place / "checkpoints" / "6" for place in ("whole", "parts"))
    assert (whole / checkpoint.WEIGHTS).read_bytes() == (parts / checkpoint.WEIGHTS).read_bytes()
    states = [torch.load(each / checkpoint.STATE, weights_only=True)["optimizer"] for each in (whole, parts)]
    for name in ("muon", "adamw") if optimizer == "muon" else (None,):
        one, other = (state[name] if name else state for state in states)
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
        assert one["state"] and one["param_groups"] == other["param_groups"]
