"""Weights laid out for decoding give what the model gives, and leave the model as it is."""

import pytest
import torch

from lookfar.model import generate as writing
from lookfar.model import packed
from lookfar.model.generate import Sampling, generate
from lookfar.model.packed import Packed, pack
from test_decoder import build, words
from tolerance import assert_near

suits = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
OPTIONS = [{}, {"tied": False}, {"groups": 2, "activation": "gelu"}, {"scheme": "gate + differential", "qk_norm": True}]


@suits
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_a_packed_model_is_the_model(options, rows):
    model, tokens = build(**options), words(9, rows)
    twin = pack(model, rows)
    assert any(isinstance(each, Packed) for each in twin.modules())
    assert not any(isinstance(each, Packed) for each in model.modules())
    caches = model.cache(batch=rows), twin.cache(batch=rows)
    for place in range(9):
        one = tokens[:, place : place + 1]
        assert_near(twin(one, cache=caches[1]), model(one, cache=caches[0]), f"token {place}")


@suits
@torch.no_grad()
def test_what_is_learned_later_is_in_the_next_pack():
    model, tokens = build(), words(5, 1)
    before = pack(model, 1)(tokens)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    after = pack(model, 1)(tokens)
    assert_near(after, model(tokens))
    assert (after - before).abs().max() > 1e-2


def test_a_model_that_does_not_suit_is_itself(monkeypatch):
    double = build(dtype="float64")
    assert pack(double, 1) is double
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        assert pack(model, 1) is model
    monkeypatch.setattr(packed, "LARGEST", 10)
    assert pack(model, 1) is model


@suits
def test_writing_packs_after_the_prompt_and_once(monkeypatch):
    model, asked = build(), []
    monkeypatch.setattr(writing, "pack", lambda model, rows: asked.append(rows) or pack(model, rows))
    texts = generate(model, [[1, 2, 3], [4]], tokens=12, sampling=Sampling(temperature=0.0))
    assert asked == [2]
    generate(model, [[1]], tokens=4, sampling=Sampling(temperature=0.0))
    assert asked == [2], "a few tokens are not worth it"
    for prompt, text in zip([[1, 2, 3], [4]], texts, strict=True):
        with torch.no_grad():
            whole = model(torch.tensor([prompt + text]))[0]
        best = whole.max(-1).values[len(prompt) - 1 : -1]
        chosen = whole[len(prompt) - 1 : -1].gather(1, torch.tensor(text)[:, None])[:, 0]
        assert_near(chosen, best, "each was the likeliest")


@suits
def test_a_model_can_be_trained_after_it_has_written():
    model = build().train()
    generate(model, [[1, 2]], tokens=12)
    model(words(6, 2)).sum().backward()
    assert all(each.grad is not None for each in model.parameters())
