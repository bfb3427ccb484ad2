"""Every path that a computation can take, each a function of an expression.

A path answers None where it gives what the definition gives, in outputs and in gradients, or the sentence with which it
refuses; it raises an AssertionError where it gives anything else. `PATHS` holds all of them by name and `GROUPS` their
names, in the order of the tables that `docs/paths.py` writes.

The definition is always the reference kernel, run on nothing but the tokens that a row sees.
"""

import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, wraps
from multiprocessing import get_context
from unittest import mock

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import flex_attention

import lookfar
from lookfar.batch import consecutive
from lookfar.errors import UserError
from lookfar.kernels import dispatch, slots, square
from lookfar.sight import Sight
from test_laws import decoder, words
from tolerance import assert_as_good, assert_near

Path = Callable[[str], str | None]
Results = dict[str, Tensor]
SIGHTS, KERNELS, TYPES, PASSES = "Who sees whom", "Kernels", "Types and compilers", "Backward passes"
PATHS: dict[str, Path] = {}
GROUPS: dict[str, list[str]] = {group: [] for group in (SIGHTS, KERNELS, TYPES, PASSES)}

T = 17  # one more than the fewest rows that make a chunk
ROWS = (0, 4, T - 1)
SIZES = (1, 3, 7, *[1] * (T - 11))
WINDOW = 4
PACKED = "aaaabbbbbbccccccc", "abbab.abba.bacacc"  # a letter for each token, '.' for padding
NEIGHBOURS = "aaaabbbbbbccccccc", "aaaaaaaaaabbbb..."  # documents that lie whole
ON_A_GPU = {"dape", "distance"}  # kernels with tests of their own
FEW, MANY = 6, 40  # draws of which the mean is taken
NO_SECOND = ("is not implemented", "once_differentiable")  # what torch says of a kernel without a second derivative


def path(name: str, group: str) -> Callable[[Path], Path]:
    """Give a path its name; a UserError that it meets is its answer."""

    def named(function: Path) -> Path:
        @wraps(function)
        def answer(expression: str) -> str | None:
            try:
                return function(expression)
            except UserError as error:
                reason = str(error).removesuffix(".")
                return reason.partition("does not take this call: ")[2] or reason

        PATHS[name] = answer
        GROUPS[group].append(name)
        return answer

    return named


# What is compared


def model_of(expression: str, **settings) -> lookfar.Decoder:
    """A tiny decoder with noise on all that its methods learn."""
    return decoder(expression, tied=False, **settings)


@contextmanager
def by(model: lookfar.Decoder, kernel: str | None):
    """Attention by the kernel of this name; None: by the one that is chosen."""
    before = [block.attention.kernel for block in model.blocks]
    for block in model.blocks:
        block.attention.kernel = kernel
    try:
        yield
    finally:
        for block, old in zip(model.blocks, before, strict=True):
            block.attention.kernel = old


def loss_of(logits: Tensor) -> Tensor:
    """A number that every logit moves by another amount."""
    towards = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return (logits * towards.to(logits)).sum()


def results(model: lookfar.Decoder, run: Callable[[], Tensor], kernel: str | None = None) -> Results:
    """Logits, and the gradients of all parameters; what has no part in them counts as zero."""
    with by(model, kernel):
        logits = run()
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(loss_of(logits), parameters, allow_unused=True)
    zero = [torch.zeros_like(one) if each is None else each for one, each in zip(parameters, found, strict=True)]
    return {"logits": logits.detach(), **dict(zip(names, zero, strict=True))}


def agree(found: Results, expected: Results, what: str = "") -> None:
    """Near in everything, and something is there to be compared."""
    assert expected["logits"].abs().max() > 1e-3 and expected["embedding.weight"].abs().max() > 1e-3
    for name, each in expected.items():
        assert_near(found[name], each, f"{name} {what}")


def decoded(model: lookfar.Decoder, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """Logits through a cache: a prefill in chunks, then one token at a time."""
    with torch.no_grad(), by(model, None):
        room, pieces, start = model.cache(batch=len(tokens), length=4), [], 0
        for size in SIZES:
            new = slice(start, start + size)
            own = None if documents is None else documents[:, new]
            pieces.append(model(tokens[:, new], documents=own, cache=room))
            start += size
    assert start == room.length == tokens.shape[1]
    return torch.cat(pieces, dim=1)


def numbers(words_of_letters: tuple[str, ...]) -> Tensor:
    """The document of each token."""
    return torch.tensor([[".abc".index(letter) - 1 for letter in word] for word in words_of_letters])


def texts() -> list[tuple[int, list[int]]]:
    """Line and places of every document of `PACKED`."""
    return [
        (line, [place for place in range(T) if word[place] == letter])
        for line, word in enumerate(PACKED)
        for letter in sorted(set(word) - {"."})
    ]


# Who sees whom


@path("reference", SIGHTS)
def rows_alone(expression: str) -> str | None:
    """The reference itself: a row of the whole is the last row of what came before it."""
    model, tokens = model_of(expression), words(T)
    alone = results(model, lambda: torch.stack([model(tokens[:, : row + 1])[:, -1] for row in ROWS], 1), "reference")
    agree(results(model, lambda: model(tokens)[:, ROWS], "reference"), alone)
    agree(results(model, lambda: model(tokens)[:, ROWS]), alone, "of the kernel that is chosen")
    return None


@path("kv cache", SIGHTS)
def kv_cache(expression: str) -> str | None:
    """Chunks of 1, 3 and 7, then one token at a time; gradients reach what is new after a prefix kept without them."""
    model, tokens = model_of(expression), words(T)
    whole = results(model, lambda: model(tokens), "reference")
    assert_near(decoded(model, tokens), whole["logits"], "decoded")

    agree(*after_a_prefix(model, T - 9, None))
    return None


def after_a_prefix(
    model: lookfar.Decoder, new: int, kernel: str | None, documents: Tensor | None = None
) -> tuple[Results, Results]:
    """Logits of `new` tokens after 9 that are cached without gradients, and the gradients that they alone have."""
    tokens, span = words(T), slice(9, 9 + new)
    tokens[:, :9] %= 8
    tokens[:, span] = 8 + tokens[:, span] % 9  # no new token occurs in the prefix
    prefix, own, both = (
        None if documents is None else documents[:, part] for part in (slice(9), span, slice(span.stop))
    )
    room = model.cache(batch=2, length=4)
    with torch.no_grad(), by(model, None):
        model(tokens[:, :9], documents=prefix, cache=room)
    found = results(model, lambda: model(tokens[:, span], documents=own, cache=room), kernel)
    expected = results(model, lambda: model(tokens[:, : span.stop], documents=both)[:, span], "reference")
    for each in (found, expected):
        each["embedding.weight"] = each["embedding.weight"][8:]
    kept = ("logits", "embedding.weight", "head.weight")
    return {name: found[name] for name in kept}, {name: expected[name] for name in kept}


@path("left padding", SIGHTS)
def left_padding(expression: str) -> str | None:
    """Tokens of padding in front change neither logits nor gradients, nor what is decoded after them."""
    model, tokens, pads = model_of(expression), words(T), (6, 1)
    documents = torch.tensor([[-1] * count + [0] * (T - count) for count in pads])

    def kept(logits: Tensor) -> Tensor:
        return torch.cat([logits[line, count:] for line, count in enumerate(pads)])

    def alone() -> Tensor:
        return torch.cat([model(tokens[line : line + 1, count:])[0] for line, count in enumerate(pads)])

    expected = results(model, alone, "reference")
    agree(results(model, lambda: kept(model(tokens, documents=documents))), expected)
    assert_near(kept(decoded(model, tokens, documents)), expected["logits"], "decoded")
    return None


@path("packed documents", SIGHTS)
def packed(expression: str) -> str | None:
    """Texts one after another or in between one another are texts alone, decoded too."""
    model, tokens, documents = model_of(expression), words(T), numbers(PACKED)

    def kept(logits: Tensor) -> Tensor:
        return torch.cat([logits[line, own] for line, own in texts()])

    def alone() -> Tensor:
        return torch.cat([model(tokens[line : line + 1, own])[0] for line, own in texts()])

    expected = results(model, alone, "reference")
    agree(results(model, lambda: kept(model(tokens, documents=documents))), expected)
    assert_near(kept(decoded(model, tokens, documents)), expected["logits"], "decoded")
    return None


@path("windows", SIGHTS)
def windows(expression: str) -> str | None:
    """A row in a window is the last row of the few tokens that it sees; a cache changes nothing."""
    one, tokens = model_of(expression, layers=1, window=WINDOW), words(T)
    whole = model_of(expression, layers=1)
    numbered = torch.arange(T)[None]

    def alone() -> Tensor:
        spans = [slice(max(0, row - WINDOW + 1), row + 1) for row in ROWS]
        return torch.stack([whole(tokens[:, span], positions=numbered[:, span])[:, -1] for span in spans], 1)

    agree(results(one, lambda: one(tokens)[:, ROWS]), results(whole, alone, "reference"))
    mixed = model_of(expression, window=(WINDOW, None))
    expected = results(mixed, lambda: mixed(tokens), "reference")
    agree(results(mixed, lambda: mixed(tokens)), expected, "in layers of different windows")
    assert_near(decoded(mixed, tokens), expected["logits"], "decoded")
    return None


SLOTS, ENDS = 3, torch.tensor([[T, 5], [0, 11]])


def slots_alone(model: lookfar.Decoder, tokens: Tensor) -> Tensor:
    """Every slot as the last token of the text that it follows, its embedding being a word of its own."""
    table = torch.cat([model.embedding.weight, model.slot_embedding.weight])
    first, found = model.embedding.num_embeddings, []
    for line, anchor, slot in itertools.product(range(2), range(2), range(SLOTS)):
        end = int(ENDS[line, anchor])
        own = torch.cat([tokens[line, :end], torch.tensor([first + slot])])[None]
        positions = torch.tensor([[*range(end), end + slot]])
        found.append(functional_call(model, {"embedding.weight": table}, own, {"positions": positions})[0, -1])
    return torch.stack(found)


@path("parallel slots", SIGHTS)
def parallel_slots(expression: str) -> str | None:
    """Slots asked for together are the next tokens of each text alone; so are those after a cached text."""
    model, tokens = model_of(expression, slots=SLOTS), words(T)

    def together() -> Tensor:
        return model.logits(model.slot_states(tokens, ends=ENDS)[1]).flatten(0, 2)

    expected = results(model, lambda: slots_alone(model, tokens), "reference")
    agree(results(model, together), expected)
    with torch.no_grad(), by(model, None):
        room = model.cache(batch=2, length=4)
        model.states(tokens[:, :12], cache=room)
        cached = model.slot_states(tokens[:, 12:], ends=ENDS, cache=room)[1]
        assert_near(model.logits(cached).flatten(0, 2), expected["logits"], "after a cached text")
    return None


@path("both ways", SIGHTS)
def both_ways(expression: str) -> str | None:
    """Texts packed into one line, each seeing all of itself, are texts alone that do."""
    model, tokens, documents = model_of(expression), words(T), numbers(PACKED)
    sight = Sight.bidirectional(T, positions=consecutive(documents), documents=documents)

    def together() -> Tensor:
        logits = model(tokens, sight=sight)
        return torch.cat([logits[line, own] for line, own in texts()])

    def alone() -> Tensor:
        each = [(tokens[line : line + 1, own], Sight.bidirectional(len(own))) for line, own in texts()]
        return torch.cat([model(text, sight=sight)[0] for text, sight in each])

    expected = results(model, alone, "reference")
    agree(results(model, together), expected)
    agree(results(model, alone), expected, "alone")
    return None


# Kernels


@contextmanager
def cut_small():
    """Kernels that go through queries or slots in chunks make several of these few."""
    chunked = dispatch._kernel("chunked")
    with (
        mock.patch.multiple(chunked, entries=1, whole=0),
        mock.patch.object(square, "CHUNK", 5),
        mock.patch.multiple(slots, ENTRIES=1, LEAST=1),
    ):
        yield


def refused(function: Callable[[], Results]) -> str | None:
    """The sentence of a refusal."""
    try:
        function()
    except UserError as error:
        return str(error)
    return None


def kernel(name: str, expression: str) -> str | None:
    """The kernel of this name in small pieces; packed in a window as well, where that is not refused."""
    model, tokens = model_of(expression), words(T)
    with cut_small():
        agree(results(model, lambda: model(tokens), name), results(model, lambda: model(tokens), "reference"))
        if not refused(lambda: packed_in_a_window(expression, name)):
            agree(packed_in_a_window(expression, name), packed_in_a_window(expression, "reference"))
    return None


def packed_in_a_window(expression: str, name: str) -> Results:
    """Logits and gradients where documents and windows decide."""
    model, tokens, documents = model_of(expression, window=(WINDOW, None)), words(T), numbers(PACKED)
    return results(model, lambda: model(tokens, documents=documents), name)


@path("chunked", KERNELS)
def chunked(expression: str) -> str | None:
    """A few rows at a time, computed again in the backward pass."""
    return kernel("chunked", expression)


@path("square", KERNELS)
def square_(expression: str) -> str | None:
    """One product a chunk of queries."""
    return kernel("square", expression)


@path("strips", KERNELS)
def strips(expression: str) -> str | None:
    """Compiled code, in float32 alone: as good as the reference in the mean of some draws, packed in a window."""
    model, documents = model_of(expression, dtype="float32", window=(WINDOW, None)), numbers(NEIGHBOURS)
    exact, draws = copy.deepcopy(model).double(), []

    def found(some: lookfar.Decoder, seed: int, name: str) -> Results:
        return results(some, lambda: some(words(T, seed=seed), documents=documents), name)

    for seed in range(FEW // 2):
        true, definition = found(exact, seed, "reference"), found(model, seed, "reference")
        draws.append({"true": true, "definition": definition, "strips": found(model, seed, "strips")})
    compare(draws, "float32", [("strips", each) for each in in_all_layers(model)])
    return None


@path("sdpa", KERNELS)
def sdpa(expression: str) -> str | None:
    """torch's fused attention."""
    return kernel("sdpa", expression)


@path("sdpa, packed", KERNELS)
def sdpa_packed(expression: str) -> str | None:
    """torch's fused attention with a dense mask."""
    agree(packed_in_a_window(expression, "sdpa"), packed_in_a_window(expression, "reference"))
    return None


@path("row", KERNELS)
def row(expression: str) -> str | None:
    """One token after a cached prefix; packed in a window as well, where the method takes that."""
    agree(*after_a_prefix(model_of(expression), 1, "row"))
    model, documents = model_of(expression, window=(WINDOW, None)), numbers(PACKED)
    if refused(lambda: packed_in_a_window(expression, "reference")) is None:
        agree(*after_a_prefix(model, 1, "row", documents))
    return None


@path("slots", KERNELS)
def slots_(expression: str) -> str | None:
    """A slot or two at a time."""
    model, tokens = model_of(expression, slots=SLOTS), words(T)

    def together() -> Tensor:
        return model.logits(model.slot_states(tokens, ends=ENDS)[1]).flatten(0, 2)

    with cut_small():
        agree(results(model, together, "slots"), results(model, lambda: slots_alone(model, tokens), "reference"))
    return None


@path("flex", KERNELS)
def flex(expression: str) -> str | None:
    """FlexAttention without its compiler: logits in float32, which are all that it gives on a CPU."""
    model, tokens, documents = model_of(expression, dtype="float32"), words(T), numbers(PACKED)
    window = model_of(expression, dtype="float32", window=(WINDOW, None))
    cases = [lambda: model(tokens), lambda: window(tokens, documents=documents)]
    for each, run in zip((model, window), cases, strict=True):
        with torch.no_grad(), by(each, "reference"):
            try:
                expected = run()
            except UserError:  # the method's own, of documents or windows
                continue
        with torch.no_grad(), by(each, "flex"), uncompiled():
            assert_near(run(), expected)
    return None


@contextmanager
def uncompiled():
    """Score functions and masks of FlexAttention are run as they are."""
    with (
        mock.patch.object(dispatch._kernel("flex"), "compiled", False),
        mock.patch.object(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
    ):
        yield


def willing(expression: str) -> list[str]:
    """The kernels that take a plain call."""

    def takes(name: str) -> bool:
        return refused(lambda: results(model, lambda: model(tokens), name)) is None

    model, tokens = model_of(expression), words(T)
    return [name for name in lookfar.names("kernels") if takes(name)]


# Narrow types


def draw(model: lookfar.Decoder, exact: lookfar.Decoder, kernels: list[str], seed: int) -> dict[str, Results]:
    """Logits and gradients for one text: the true ones, the reference's, those of every kernel, and the cache's."""
    tokens = words(T, seed=seed)
    return {
        "true": results(exact, lambda: exact(tokens), "reference"),
        "definition": results(model, lambda: model(tokens), "reference"),
        "cache": {"logits": decoded(model, tokens)},
        **{name: results(model, lambda: model(tokens), name) for name in kernels},
    }


def narrow(expression: str, dtype: str) -> str | None:
    """By every willing kernel and through the cache, in the mean of some draws, as good as the reference."""
    try:
        as_good(expression, dtype, range(FEW))
    except AssertionError:
        as_good(expression, dtype, range(MANY))  # a few may have been bad luck
    return None


def as_good(expression: str, dtype: str, seeds: range) -> None:
    """Over these draws, no further off than twice the reference and a rounding unit."""
    model = model_of(expression, dtype=dtype)
    exact, kernels = copy.deepcopy(model).double(), [name for name in willing(expression) if name != "reference"]
    with cut_small():
        draws = [draw(model, exact, kernels, seed) for seed in seeds]
    compare(draws, dtype, [("cache", ("logits", ["logits"])), *itertools.product(kernels, in_all_layers(model))])


def compare(draws: list[dict[str, Results]], dtype: str, what_of: list[tuple[str, tuple[str, list[str]]]]) -> None:
    """In the mean of these draws, no further off than twice the reference and a rounding unit."""
    largest = max(each.abs().max() for each in draws[0]["true"].values())
    for name, (what, alike) in what_of:
        found, definition, true = (
            [each[kind][one] for each in draws for one in alike] for kind in (name, "definition", "true")
        )
        if true[0].abs().max() > 1e-9 * largest:  # of what has no effect only rounding is left
            assert_as_good(found, definition, true, getattr(torch, dtype), f"{what} of {name}")


def in_all_layers(model: lookfar.Decoder) -> list[tuple[str, list[str]]]:
    """Logits, and parameters with the names of the same one in every layer: more draws of one error."""
    names = defaultdict(list)
    for name in ("logits", *dict(model.named_parameters())):
        names[re.sub(r"blocks\.\d+", "block", name)].append(name)
    return [*names.items()]


@path("float32", TYPES)
def float32(expression: str) -> str | None:
    """Against float64, no further off than twice the reference and a rounding unit."""
    return narrow(expression, "float32")


@path("bfloat16", TYPES)
def bfloat16(expression: str) -> str | None:
    """Against float64, no further off than twice the reference and a rounding unit."""
    return narrow(expression, "bfloat16")


# Compiled


def compile_with(expression: str, backend: str, **options) -> None:
    """Logits and gradients of a compiled model are the definition's."""
    torch.set_num_threads(1)
    torch.compiler.reset()
    model, tokens = model_of(expression, layers=1), words(T)
    expected = results(model, lambda: model(tokens), "reference")
    with by(model, None):
        compiled = torch.compile(model, backend=backend, **options)
        agree(results(model, lambda: compiled(tokens)), expected)


def compile_masked(expression: str, backend: str) -> None:
    """The same in float32 by torch's fused attention with a dense mask, whose gradients a compiler may rewrite."""
    torch.set_num_threads(1)
    torch.compiler.reset()
    model, tokens, documents = model_of(expression, layers=1, dtype="float32"), words(T), numbers(PACKED)
    expected = results(model, lambda: model(tokens, documents=documents), "reference")
    compiled = torch.compile(model, backend=backend)
    agree(results(model, lambda: compiled(tokens, documents=documents), "sdpa"), expected)


def decode_compiled(expression: str, backend: str) -> None:
    """A text longer than the first, and the cache after it, by one compiled model."""
    torch.set_num_threads(1)
    torch.compiler.reset()
    model = model_of(expression, layers=1)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for tokens in (words(T - 4, seed=8), words(T)):
            with by(model, None):
                found = compiled(tokens)
            with by(model, "reference"):
                assert_near(found, model(tokens), f"{tokens.shape[1]} tokens")
        with by(model, None):
            room, start, pieces = model.cache(batch=2, length=T), 0, []
            for size in (T - 4, 1, 1, 1, 1):
                pieces.append(compiled(tokens[:, start : start + size], cache=room))
                start += size
        with by(model, "reference"):
            assert_near(torch.cat(pieces, 1), model(tokens), "decoded")


@cache
def apart() -> ProcessPoolExecutor:
    """A process of its own: a compiler cannot see through the checks of shapes that tests put around functions."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


@path("aot_eager", TYPES)
def aot_eager(expression: str) -> str | None:
    """torch.compile as far as the graphs of both passes."""
    return apart().submit(compile_with, expression, "aot_eager").result()


@path("inductor", TYPES)
def inductor(expression: str) -> str | None:
    """torch.compile with the compiler that it has by default."""
    return apart().submit(compile_with, expression, "inductor").result()


# Backward passes


@path("second backward", PASSES)
def second_backward(expression: str) -> str | None:
    """Another backward pass through what was kept gives the same gradients, bit for bit, by every willing kernel."""
    model, tokens = model_of(expression), words(T)
    with cut_small():
        for name in willing(expression):
            with by(model, name):
                loss, parameters = loss_of(model(tokens)), [*model.parameters()]
                once = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                twice = torch.autograd.grad(loss, parameters, allow_unused=True)
            pairs = [each for each in zip(once, twice, strict=True) if each[0] is not None]
            assert len(pairs) > 5 and all(torch.equal(*each) for each in pairs), name
    return None


def second(expression: str, kernel: str | None) -> Results:
    """Logits, and the derivatives of the squared length of all gradients."""
    model, tokens = model_of(expression), words(T)

    def length() -> Tensor:
        loss = model(tokens).square().mean()
        own = [*model.parameters()]
        gradients = torch.autograd.grad(loss, own, create_graph=True, allow_unused=True)
        return torch.stack([each.square().sum() for each in gradients if each is not None]).sum()

    return results(model, length, kernel)


def twice_derived(expression: str, kernel: str | None) -> str | None:
    try:
        with cut_small():
            found = second(expression, kernel)
    except RuntimeError as error:
        if not any(words_of_torch in str(error) for words_of_torch in NO_SECOND):
            raise
        return "torch's fused kernel has no second derivative"
    agree(found, second(expression, "reference"))
    return None


@path("second derivative", PASSES)
def second_derivative(expression: str) -> str | None:
    """The gradient of a length of the gradient, by the kernel that is chosen for a short text, and in chunks."""
    return twice_derived(expression, None) or twice_derived(expression, "chunked")


@path("second derivative, sdpa", PASSES)
def second_derivative_of_sdpa(expression: str) -> str | None:
    """The same by torch's fused attention, which long texts take."""
    return twice_derived(expression, "sdpa")
