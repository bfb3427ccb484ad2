"""A causal model of transformers goes through the same evaluator as lookfar's own."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from torch.nn import functional as F

from lookfar import cli
from lookfar.data.base import Document
from lookfar.errors import UserError
from lookfar.evaluation.perplexity import Perplexity
from lookfar.evaluation.protocols import find
from lookfar.interop import hugging_face

transformers = pytest.importorskip("transformers")
TEXT = "the weather of the theatre,\tüber alles 3 €\n\nand  more of it: 東京 one two\n" * 3


def llama(folder, **settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, **settings)
    save(transformers.LlamaForCausalLM(config), folder)


def save(model, folder):
    """A random model whose losses differ from token to token, and a byte-level tokenizer, as a folder."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("llama")
    llama(place)
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def loaded(folder):
    model, tokenizer = hugging_face.load(str(folder), device="cpu")
    return model, hugging_face.encode(tokenizer, folder / "text.txt")


def losses_after(model, tokens):
    """The loss of each token that follows another in one window, by transformers alone."""
    given = torch.from_numpy(np.asarray(tokens))[None]
    with torch.no_grad():
        logits = model.model(input_ids=given[:, :-1]).logits
    return F.cross_entropy(logits[0], given[0, 1:], reduction="none").tolist()


def measure(model, text, length, protocol):
    rows = Perplexity().measure(model, text, length=length, protocol=find(protocol), progress=lambda *told: None)
    return {row["metric"]: row for row in rows}


def test_non_overlapping_is_each_block_alone(loaded):
    model, text = loaded
    blocks = [text.tokens[start : start + 14] for start in range(0, len(text.tokens) - 1, 13)]
    expected = [each for block in blocks for each in losses_after(model, block)]
    found = measure(model, text, 13, "non_overlapping")
    assert found["loss"]["count"] == len(expected) == len(text.tokens) - 1
    assert found["loss"]["value"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_sliding_by_one_is_a_window_for_each_token(loaded):
    model, text = loaded
    windows = [text.tokens[max(0, place - 7) : place + 1] for place in range(1, len(text.tokens))]
    expected = np.mean([losses_after(model, window)[-1] for window in windows])
    assert measure(model, text, 7, "sliding(stride=1)")["loss"]["value"] == pytest.approx(expected, rel=1e-5)


def test_the_last_of_each_window_are_scored(loaded):
    model, text = loaded
    blocks = [text.tokens[start : start + 14] for start in range(0, len(text.tokens) - 13, 13)]
    expected = np.mean([each for block in blocks for each in losses_after(model, block)[-5:]])
    assert measure(model, text, 13, "last(k=5)")["loss"]["value"] == pytest.approx(expected, rel=1e-5)


def test_bos_stands_before_every_window(loaded):
    model, text = loaded
    assert text.bos == 0
    blocks = [text.tokens[start : start + 14] for start in range(0, len(text.tokens) - 1, 13)]
    expected = [each for block in blocks for each in losses_after(model, [0, *block])[1:]]
    found = measure(model, text, 13, "non_overlapping(bos=true)")
    assert found["loss"]["value"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert (found["loss"]["protocol"], found["loss"]["first"]) == ("non_overlapping(bos=true)", "bos")


def test_bytes_and_words_are_those_of_the_text(loaded):
    model, text = loaded
    found = measure(model, text, 13, "non_overlapping")
    places = np.arange(1, len(text.tokens))
    sizes, words = text.spelling.count(text.tokens[1:], text.tokens[:-1], places)
    assert sizes.sum() == len(TEXT.encode()) - len("the")  # the only token that is not scored
    assert words.sum() == len(TEXT.split()) - 1  # the first word begins in the first token
    loss = found["loss"]["value"] * len(places)
    assert found["bits_per_byte"]["value"] == pytest.approx(loss / math.log(2) / sizes.sum())
    assert found["word_perplexity"]["value"] == pytest.approx(math.exp(loss / words.sum()))


def test_a_model_that_does_more_than_a_product_for_its_logits_is_measured_whole(tmp_path, loaded):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.Gemma2Config(**sizes, **heads, max_position_embeddings=64, final_logit_softcapping=3.0)
    save(transformers.Gemma2ForCausalLM(config), tmp_path)
    model, text = hugging_face.load(str(tmp_path), device="cpu")[0], loaded[1]
    assert model.head is None and loaded[0].head is not None
    windows = [text.tokens[max(0, place - 7) : place + 1] for place in range(1, len(text.tokens))]
    expected = np.mean([losses_after(model, window)[-1] for window in windows])
    assert measure(model, text, 7, "sliding(stride=1)")["loss"]["value"] == pytest.approx(expected, rel=1e-5)


def test_documents_of_a_folder_are_tokenized_alone_and_kept_apart(folder, loaded, tmp_path):
    model, tokenizer = loaded[0], hugging_face.load(str(folder), device="cpu")[1]
    texts = ["the weather of", "über alles 3 €\n", " one two three"]
    for name, text in zip(("a.txt", "b.txt", "deep/c.md"), texts, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = hugging_face.encode(tokenizer, tmp_path)
    alone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert found.tokens.tolist() == [*alone[0], *alone[1], *alone[2]]  # this tokenizer has no token that ends a text
    assert found.starts.tolist() == [0, len(alone[0]), len(alone[0]) + len(alone[1])]
    assert found.label.startswith(f"{tmp_path.name}@")
    assert int(found.spelling.bytes.sum()) == len("".join(texts).encode())
    rows = measure(model, found, 6, "non_overlapping")
    assert rows["loss"]["documents"] == 3 and rows["loss"]["low"] < rows["loss"]["value"] < rows["loss"]["high"]
    tokenizer.add_special_tokens({"eos_token": "<s>"})
    ended = hugging_face.encode(tokenizer, tmp_path)
    assert ended.tokens.tolist() == [*alone[0], 0, *alone[1], 0, *alone[2]]
    assert ended.starts.tolist() == [0, len(alone[0]) + 1, len(alone[0]) + len(alone[1]) + 2]
    assert int(ended.spelling.bytes.sum()) == int(found.spelling.bytes.sum())
    assert (
        int(ended.spelling.within.sum()) == int(found.spelling.within.sum()) == sum(len(each.split()) for each in texts)
    )
    last = measure(model, ended, 3, "last(k=2)")
    assert last["loss"]["documents"] == 3


def test_documents_of_a_source_are_those_of_its_held_out_split(folder, tmp_path, monkeypatch):
    tokenizer = hugging_face.load(str(folder), device="cpu")[1]
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(f"{split} of it one two", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = hugging_face.encode(tokenizer, "text_file(path='.')")
    assert found.tokens.tolist() == tokenizer("valid of it one two", add_special_tokens=False)["input_ids"]
    assert found.label.startswith("text_file(path='.')@")
    with pytest.raises(UserError, match="names 2 sources"):
        hugging_face.encode(tokenizer, "text_file(path=a) + python_library")
    with pytest.raises(UserError, match="There is no file nowhere"):
        hugging_face.encode(tokenizer, "nowhere")


def test_parts_of_a_long_document_are_one():
    parts = [Document("a", "one "), Document("a", "two", continues=True), Document("b", "three")]
    assert [*hugging_face._joined(parts)] == ["one two", "three"]


def test_a_model_that_cannot_make_the_last_logits_alone_is_measured_all_the_same(loaded):
    model, text = loaded

    class Old(torch.nn.Module):
        """A model whose forward knows no `logits_to_keep`, and which has no part that gives states."""

        def __init__(self):
            super().__init__()
            self.inner, self.config, self.device, self.dtype = (
                model.model,
                model.model.config,
                model.device,
                model.dtype,
            )

        @property
        def base_model(self):
            return self

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, input_ids, use_cache=None):
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    old = hugging_face.CausalModel(Old(), "old")
    assert old.head is None and not old.keeps
    for protocol in ("sliding(stride=1)", "last(k=3)"):
        expected = measure(model, text, 7, protocol)["loss"]["value"]
        assert measure(old, text, 7, protocol)["loss"]["value"] == pytest.approx(expected, rel=1e-5)


def test_a_learned_table_ends_and_a_rotation_does_not(tmp_path, loaded):
    config = transformers.GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    save(transformers.GPT2LMHeadModel(config), tmp_path)
    model = hugging_face.load(str(tmp_path), device="cpu")[0]
    assert (model.farthest, loaded[0].farthest) == (16, None)
    assert math.isfinite(measure(model, loaded[1], 16, "non_overlapping")["loss"]["value"])
    with pytest.raises(UserError, match="Length 17 lies beyond the learned table of 16"):
        measure(model, loaded[1], 17, "non_overlapping")
    with pytest.raises(UserError, match=r"Length 16 lies beyond .* evaluate at most 15"):
        measure(model, loaded[1], 16, "non_overlapping(bos=true)")


def test_the_command_measures_a_folder_and_writes_the_rows(folder, tmp_path, monkeypatch, capsys):
    words = ["evaluate", f"hf:{folder}", "--data", folder / "text.txt", "--lengths", "8,32", "--folder", tmp_path]
    monkeypatch.setattr(sys, "argv", ["lookfar", *map(str, words), "--protocol", "last(k=4)", "--by-position"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code, capsys.readouterr().err
    assert "last(k=4)" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(row["scheme"], row["context"], row["length"]) for row in rows} == {("llama", 16, 8), ("llama", 16, 32)}
    found = {row["metric"]: row for row in rows if row["length"] == 8}
    assert {row["metric"] for row in rows} == {*("loss", "perplexity", "bits_per_byte", "word_perplexity", "loss_at")}
    model, tokenizer = hugging_face.load(str(folder), device="cpu")
    text = hugging_face.encode(tokenizer, folder / "text.txt")
    assert found["loss"]["value"] == measure(model, text, 8, "last(k=4)")["loss"]["value"]


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        ([], "give --data FILE and --lengths"),
        (["--data", "TEXT", "--lengths", "8", "--scheme", "rope"], "--scheme is for runs"),
        (["--data", "nowhere.txt", "--lengths", "8"], "There is no file nowhere.txt"),
    ],
)
def test_what_is_missing_is_told(more, answer, folder, monkeypatch, capsys):
    words = [str(folder / "text.txt") if word == "TEXT" else word for word in more]
    monkeypatch.setattr(sys, "argv", ["lookfar", "evaluate", f"hf:{folder}", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and answer in capsys.readouterr().err.replace("\n", " ")


def test_a_missing_library_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install lookfar\[hub\]"):
        hugging_face.load("gpt2")


def test_a_folder_that_holds_no_model_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a causal model"):
        hugging_face.load(str(Path(tmp_path)))
