"""A causal model of transformers goes through the same evaluator as lookfar's own."""

import json
import math
import re
import shutil
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
from lookfar.training.folder import claim

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
def table(tmp_path_factory):
    """A model of 16 learned positions."""
    place = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    save(transformers.GPT2LMHeadModel(config), place)
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


def test_a_learned_table_ends_and_a_rotation_does_not(table, loaded):
    model = hugging_face.load(str(table), device="cpu")[0]
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
    rows = read_rows(tmp_path)
    assert {(row["scheme"], row["context"], row["length"]) for row in rows} == {("llama", 16, 8), ("llama", 16, 32)}
    found = {row["metric"]: row for row in rows if row["length"] == 8}
    assert {row["metric"] for row in rows} == {*("loss", "perplexity", "bits_per_byte", "word_perplexity", "loss_at")}
    model, tokenizer = hugging_face.load(str(folder), device="cpu")
    text = hugging_face.encode(tokenizer, folder / "text.txt")
    assert found["loss"]["value"] == measure(model, text, 8, "last(k=4)")["loss"]["value"]


def read_rows(place):
    return [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("wanted", "lengths", "answer"),
    [
        (["non_overlapping", "slidng"], [8], "No protocol is named 'slidng'"),
        (["non_overlapping", "sliding(stride=9)"], [16, 8], "A stride of 9 would skip tokens of windows of 8"),
        (["non_overlapping"], [8, 0], "A length of 0 tokens cannot be evaluated"),
    ],
)
def test_what_cannot_be_cut_is_told_before_the_model_is_loaded(wanted, lengths, answer, tmp_path):
    with pytest.raises(UserError, match=re.escape(answer)):
        hugging_face.evaluate(str(tmp_path / "nowhere"), data="nowhere.txt", lengths=lengths, wanted=wanted)


@pytest.mark.parametrize(
    ("lengths", "wanted", "answer"),
    [
        ([8, 17], ["non_overlapping"], "Length 17 lies beyond the learned table of 16"),
        ([16], ["non_overlapping", "non_overlapping(bos=true)"], "evaluate at most 15"),
    ],
)
def test_what_lies_beyond_a_learned_table_is_told_before_anything_is_measured(lengths, wanted, answer, table, folder):
    measured = []
    given = {"data": folder / "text.txt", "device": "cpu", "progress": lambda *told: measured.append(told)}
    with pytest.raises(UserError, match=answer):
        hugging_face.evaluate(str(table), lengths=lengths, wanted=wanted, **given)
    assert not measured


def test_a_token_that_begins_a_text_is_missed_before_anything_is_measured(folder, tmp_path):
    mute = tmp_path / "mute"
    shutil.copytree(folder, mute)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(mute)
    wanted, measured = ["non_overlapping", "non_overlapping(bos=true)"], []
    given = {"data": folder / "text.txt", "device": "cpu", "progress": lambda *told: measured.append(told)}
    with pytest.raises(UserError, match="no token that begins a text"):
        hugging_face.evaluate(str(mute), lengths=[8], wanted=wanted, **given)
    assert not measured


def test_rows_are_written_length_by_length_into_a_folder_that_is_held(folder, tmp_path):
    seen = []

    def look(what, part):
        with pytest.raises(UserError, match="Another process works in"), claim(tmp_path):
            pass
        written = {row["length"] for row in read_rows(tmp_path)} if (tmp_path / "rows.jsonl").exists() else set()
        seen.append((what, written))

    given = {"data": folder / "text.txt", "wanted": ["non_overlapping"], "folder": tmp_path, "device": "cpu"}
    rows = hugging_face.evaluate(str(folder), lengths=[8, 13], progress=look, **given)
    assert dict(reversed(seen)) == {
        "non_overlapping at 8": set(),
        "non_overlapping at 13": {8},
    }
    assert read_rows(tmp_path) == rows
    with claim(tmp_path):
        pass


def test_rows_of_two_models_in_one_folder_stay(folder, tmp_path):
    other = tmp_path / "other"
    llama(other, rms_norm_eps=1e-2)
    given = {"data": folder / "text.txt", "lengths": [8], "wanted": ["non_overlapping"], "device": "cpu"}
    rows = [row for each in (folder, other) for row in hugging_face.evaluate(str(each), folder=tmp_path, **given)]
    assert read_rows(tmp_path) == rows
    assert {row["run"] for row in rows} == {str(folder), str(other)}


def reload(place):
    return hugging_face.load(str(place), device="cpu")[0]


def test_dynamic_frequencies_are_those_of_the_window_whatever_was_read_before(loaded, tmp_path):
    llama(tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0})
    model = reload(tmp_path)
    asked = [(24, "sliding(stride=12)"), (48, "non_overlapping"), (16, "non_overlapping")]
    alone = {each: measure(reload(tmp_path), loaded[1], *each) for each in asked}
    for each in (*asked, *asked[::-1]):
        assert measure(model, loaded[1], *each) == alone[each]
    tokens = torch.arange(48)[None]
    with torch.no_grad():
        model.states(tokens)
        grown = model.model(input_ids=tokens[:, :24]).logits[0]  # what transformers does by itself
        assert not torch.equal(model.logits(model.states(tokens[:, :24])[0]), grown)


def test_dynamic_frequencies_of_a_kind_of_layers_are_those_of_the_window_too(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    kinds = ["sliding_attention", "full_attention"]
    ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": dynamic}
    more = {"max_position_embeddings": 16, "sliding_window": 64, "layer_types": kinds, "rope_parameters": ropes}
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads, **more))
    save(model, tmp_path)
    model, tokens = reload(tmp_path), torch.arange(48)[None]
    with torch.no_grad():
        alone = reload(tmp_path).states(tokens[:, :24])
        assert not torch.equal(model.states(tokens)[:, :24], alone)
        assert torch.equal(model.states(tokens[:, :24]), alone)


def test_a_table_that_is_no_module_is_told_by_its_end(folder, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    save(transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes)), tmp_path)
    given = {"data": folder / "text.txt", "folder": tmp_path / "rows", "device": "cpu"}
    with pytest.raises(UserError, match="cannot read 32 tokens at once, more than its context of 16: index"):
        hugging_face.evaluate(str(tmp_path), lengths=[16, 32], wanted=["non_overlapping"], **given)
    assert {row["length"] for row in read_rows(tmp_path / "rows")} == {16}
    with pytest.raises(UserError, match="cannot read 17 tokens at once"):
        hugging_face.evaluate(str(tmp_path), lengths=[16], wanted=["non_overlapping(bos=true)"], **given)


@pytest.mark.parametrize(
    ("length", "error"),
    [
        (32, torch.OutOfMemoryError("CUDA out of memory.")),
        (32, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")),
        (16, RuntimeError("shapes do not fit")),
    ],
)
def test_what_the_context_does_not_explain_is_not_put_down_to_it(length, error, folder, monkeypatch):
    def fail(*given, **named):
        raise error

    monkeypatch.setattr(hugging_face.Perplexity, "measure", fail)
    with pytest.raises(RuntimeError) as told:
        hugging_face.evaluate(str(folder), data=folder / "text.txt", lengths=[length], device="cpu")
    assert told.value is error


def test_a_model_that_sees_what_follows_is_refused(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    more = {"num_attention_heads": 2, "max_position_embeddings": 16}
    model = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, **more))
    with pytest.raises(UserError, match="bert sees what follows"):
        hugging_face.CausalModel(model, "bert")
    save(model, tmp_path)
    with pytest.raises(UserError, match="its loss is no perplexity"):
        hugging_face.load(str(tmp_path), device="cpu")
    causal = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, **more, is_decoder=True))
    assert hugging_face.CausalModel(causal, "bert").farthest == 16


def test_a_context_of_few_tokens_is_tried_out_within_it(tmp_path):
    config = transformers.GPT2Config(vocab_size=300, n_positions=3, n_embd=16, n_layer=1, n_head=2)
    save(transformers.GPT2LMHeadModel(config), tmp_path)
    assert hugging_face.load(str(tmp_path), device="cpu")[0].farthest == 3


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


@pytest.mark.parametrize(
    ("spoil", "answer"),
    [
        ("weights", "Error while deserializing header"),
        ({"hidden_size": "x"}, r"'hidden_size': TypeError: Field 'hidden_size' expected int, got str"),
        ({"hidden_act": "nonesuch"}, "KeyError 'nonesuch'"),
    ],
)
def test_a_model_that_is_spoilt_is_told_in_one_sentence(spoil, answer, folder, tmp_path, monkeypatch, capsys):
    place = tmp_path / "spoilt"
    shutil.copytree(folder, place)
    if spoil == "weights":
        whole = (place / "model.safetensors").read_bytes()
        (place / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    else:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, **spoil}))
    words = ["lookfar", "evaluate", f"hf:{place}", "--data", str(folder / "text.txt"), "--lengths", "8"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    told = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in told
    assert re.search(f"cannot be read as a causal model of transformers: .*{answer}", told)
