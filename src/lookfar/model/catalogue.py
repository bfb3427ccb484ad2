"""The catalogue of methods: what each is and what it costs, found by building it."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from lookfar import plugins
from lookfar.attention import reference
from lookfar.attention.scheme import Scheme, build_scheme
from lookfar.kernels import Call, explain
from lookfar.methods.base import HeadMerge, InputEncoding, Method, QueryKeyEncoding, ScoreBias, ScoreMap, Sink
from lookfar.sight import Sight

COLUMNS = ("name", "kind", "paper", "what it adds", "parameters", "kernels")
HEADS, HEAD_WIDTH, CONTEXT = 12, 64, 512  # of the layer that the catalogue builds

KINDS = {
    InputEncoding: "input encoding",
    QueryKeyEncoding: "query and key encoding",
    ScoreBias: "score bias",
    ScoreMap: "score map",
    Sink: "sink",
    HeadMerge: "head merge",
}

NOPE = """nope (the empty scheme)

Adds no position encoding: order is known from the causal mask alone.

Kazemnejad et al., 2023, arXiv 2305.19466.

    weights = softmax(q · k / √head_width)

It is what remains when a scheme names no method; beside other methods it changes nothing.

No settings.

Parameters of its own: 0.
Decoding: the cache keeps keys and values, and nothing else.
Kernels that take it: all.

Known quirks: order must be learned from the causal mask, so it extrapolates on some tasks and fails in perplexity soon
after the trained length."""


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue."""

    name: str
    kind: str
    paper: str
    adds: str
    parameters: str  # in one layer of HEADS heads of HEAD_WIDTH
    kernels: str  # that take it with gradients on a CPU, preferred first


def describe(name: str) -> Entry:
    """The entry of one method."""
    thing = plugins.find("methods", name)
    if not issubclass(thing, Method):
        raise TypeError(f"{name} is not a method.")
    kind = next(words for base, words in KINDS.items() if issubclass(thing, base))
    scheme = build_scheme(name, heads=HEADS, head_width=HEAD_WIDTH, context=CONTEXT)
    count = sum(each.numel() for each in scheme.parameters())
    shared = " (all layers)" if thing.shared and count else ""
    return Entry(name, kind, thing.paper, thing.adds, f"{count:,}{shared}", _willing(scheme))


def describe_nope() -> Entry:
    """The entry of the empty scheme."""
    scheme = build_scheme("nope", heads=HEADS, head_width=HEAD_WIDTH)
    return Entry(
        "nope",
        "the empty scheme",
        "Kazemnejad et al., 2023, arXiv 2305.19466",
        "nothing",
        "0",
        _willing(scheme),
    )


def table() -> list[tuple[str, ...]]:
    """A line for each method, in the order of COLUMNS."""
    entries = [describe_nope(), *(describe(name) for name in plugins.names("methods"))]
    return [(each.name, each.kind, each.paper, each.adds, each.parameters, each.kernels) for each in entries]


def markdown(pages: str | None = None) -> str:
    """The table as Markdown; names link to their pages in the folder `pages`."""
    named = [(f"`{name}`" if pages is None else f"[`{name}`]({pages}{name}.md)", *rest) for name, *rest in table()]
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *named]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def decoding(name: str) -> str:
    """What a cache holds of one token in one layer."""
    heads = build_scheme(name, heads=HEADS, head_width=HEAD_WIDTH).heads
    numbers = heads.key_heads * heads.head_width + heads.value_heads * heads.value_width
    return f"the cache keeps {numbers:,} numbers a token and layer, keys as encoded and values, and nothing else"


def cost(name: str) -> str:
    """Multiplications of whole matrices and convolutions, counted on the definition, against the empty scheme."""
    scheme, plain = (build_scheme(each, heads=HEADS, head_width=HEAD_WIDTH) for each in (name, "nope"))
    return f"{_products(scheme) / _products(plain):.2f} times the products of plain attention at {CONTEXT} tokens"


def _products(scheme: Scheme) -> int:
    heads, sight = scheme.heads, Sight.causal(CONTEXT)
    sizes = (
        (heads.score_heads, heads.head_width),
        (heads.key_heads, heads.head_width),
        (heads.value_heads, heads.value_width),
    )
    queries, keys, values = (torch.zeros(1, count, CONTEXT, width) for count, width in sizes)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        queries, keys = (
            scheme.queries(queries, sight.query_positions),
            scheme.keys(keys, sight.key_positions),
        )
        scheme.merge(
            reference.attend(queries, keys, values, sight, scheme), torch.zeros(1, CONTEXT, HEADS * HEAD_WIDTH)
        )
    return counter.get_total_flops()


def _willing(scheme: Scheme) -> str:
    answers = explain(scheme, Call(device="cpu", queries=CONTEXT, keys=CONTEXT))
    return ", ".join(kernel for kernel, refusal in answers if refusal is None)
