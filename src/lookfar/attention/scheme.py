"""The methods of one layer, sorted by where they act."""

from collections.abc import Callable
from functools import cached_property, reduce
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lookfar import plugins
from lookfar.errors import UserError
from lookfar.methods.base import (
    DistanceBias,
    HeadMerge,
    Heads,
    InputEncoding,
    Method,
    QueryKeyEncoding,
    ScoreBias,
    ScoreMap,
    Sink,
    Site,
)
from lookfar.plugins import Term
from lookfar.sight import Rows, Sight

Kind = TypeVar("Kind", bound=Method)
Shared = dict[str, Method]


class Scheme(nn.Module):
    """How one attention layer sees position and treats its scores: a list of methods, `nope` being the empty one."""

    def __init__(self, expression: str, heads: Heads, methods: list[Method], *, soft_cap: float | None = None) -> None:
        super().__init__()
        self.expression, self.head_counts, self.soft_cap = expression, heads, soft_cap
        self.methods = nn.ModuleList(methods)
        scales = [bias.scale for bias in self.biases if bias.scale is not None]
        self.scale = scales[0] if scales else heads.head_width**-0.5

    @property
    def heads(self) -> Heads:
        """How many heads of each sort there are."""
        return self.head_counts

    @cached_property
    def inputs(self) -> list[InputEncoding]:
        """What acts on the embeddings: at most one."""
        return self._all(InputEncoding)

    @cached_property
    def encodings(self) -> list[QueryKeyEncoding]:
        """What encodes queries and keys."""
        return self._all(QueryKeyEncoding)

    @cached_property
    def biases(self) -> list[ScoreBias]:
        """What is added to the scores."""
        return self._all(ScoreBias)

    @cached_property
    def maps(self) -> list[ScoreMap]:
        """What rewrites the scores: at most one."""
        return self._all(ScoreMap)

    @cached_property
    def sinks(self) -> list[Sink]:
        """What joins the softmax."""
        return self._all(Sink)

    @cached_property
    def merges(self) -> list[HeadMerge]:
        """What follows the softmax, the merge of several maps first."""
        return sorted(self._all(HeadMerge), key=lambda merge: -merge.maps)

    def queries(self, queries: Float[Tensor, "b h t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b h t e"]:
        """Queries, encoded by their positions."""
        for encoding in self.encodings:
            queries = encoding.queries(queries, positions)
        return queries

    def keys(self, keys: Float[Tensor, "b g t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b g t e"]:
        """Keys, encoded by their positions, as a cache holds them."""
        for encoding in self.encodings:
            keys = encoding.keys(keys, positions)
        return keys

    def bias_between(
        self, query_positions: Num[Tensor, "#b q"], key_positions: Num[Tensor, "#b k"]
    ) -> Float[Tensor, "#b h q k"]:
        """The sum of all biases for every pair of positions; there must be one."""
        return self._per_map(reduce(torch.add, [each.between(query_positions, key_positions) for each in self.biases]))

    @property
    def by_distance(self) -> bool:
        """Whether all that is added to the scores depends on the distance alone."""
        return all(isinstance(bias, DistanceBias) for bias in self.biases)

    def table(self, distances: Num[Tensor, " n"]) -> Float[Tensor, "h n"]:
        """The sum of the biases that depend on the distance alone; there must be one."""
        tables = [bias.at(distances) for bias in self.biases if isinstance(bias, DistanceBias)]
        return self._per_map(reduce(torch.add, tables)[None])[0]

    def bias(self, sight: Sight) -> Float[Tensor, "#b h q k"] | None:
        """The sum of all biases; None where there is none."""
        total = None
        for bias in self.biases:
            if isinstance(bias, DistanceBias) and sight.consecutive and sight.text is None:
                each = bias.band(sight.first_query - sight.first_key, sight.queries, sight.keys)
            else:
                each = bias.between(sight.query_positions, sight.key_positions)
            total = each if total is None else total + each
        return None if total is None else self._per_map(total)

    def rewrite(self, scores: Float[Tensor, "b h q k"], rows: Rows) -> Float[Tensor, "b h q k"]:
        """The scores after soft-cap and map, with the bias added."""
        return self.biased(self.mapped(scores, rows), rows)

    def mapped(self, scores: Float[Tensor, "b h q k"], rows: Rows) -> Float[Tensor, "b h q k"]:
        """The scores after soft-cap and map, before the bias."""
        scores = self.cap(scores)
        for each in self.maps:
            scores = each.rewrite(scores, rows)
        return scores

    def biased(self, scores: Float[Tensor, "b h q k"], rows: Rows) -> Float[Tensor, "b h q k"]:
        """The scores with the bias added, unless the map has taken it in."""
        if rows.bias is None or any(not each.keeps_bias for each in self.maps):
            return scores
        return scores + rows.bias

    def cap(self, scores: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h q k"]:
        """The scores, kept between - soft_cap and soft_cap where there is one."""
        return scores if self.soft_cap is None else self.soft_cap * torch.tanh(scores / self.soft_cap)

    def sink(self, query_positions: Num[Tensor, "#b q"]) -> Float[Tensor, "#b h q"] | None:
        """The score of all sinks together; None where there is none."""
        scores = [sink.score(query_positions) for sink in self.sinks]
        if not scores:
            return None
        return self._per_map(reduce(torch.logaddexp, scores))

    def merge(
        self, outputs: Float[Tensor, "b h q v"], x: Float[Tensor, "b q d"] | None = None
    ) -> Float[Tensor, "b h2 q v"]:
        """One output per head from those of all score heads; `x` is the input of the layer, for merges that ask."""
        if not self.merges:
            return outputs
        maps = outputs.unflatten(1, (self.heads.maps, self.heads.heads)).transpose(1, 2)  # b h q v -> b h m q v
        for merge in self.merges:
            if merge.needs_inputs and x is None:
                raise UserError(f"{type(merge).__name__} reads the input of the layer; pass inputs=x, [b q d].")
            maps = merge.merge(maps, x)[:, :, None]
        return maps[:, :, 0]

    def refusal(self, sight: Sight) -> str | None:
        """Why some method is not exact under this sight; None: all are."""
        reasons = (method.refusal(sight) for method in self._methods())
        return next((reason for reason in reasons if reason), None)

    @property
    def once(self) -> bool:
        """Whether every key is encoded once, so that a cache can hold it."""
        return all(method.once for method in self._methods())

    def _methods(self) -> list[Method]:
        return [method for method in self.methods if isinstance(method, Method)]

    def _all(self, kind: type[Kind]) -> list[Kind]:
        return [method for method in self.methods if isinstance(method, kind)]

    def _per_map(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Repeat what all maps of a head share."""
        if values.shape[1] == self.heads.score_heads:
            return values
        return values.repeat(1, self.heads.maps, *(1 for _ in values.shape[2:]))


def parse(expression: str) -> list[Term]:
    """The methods of a scheme, checked: known names and settings, and a legal combination. Nothing is built."""
    terms = [term for term in plugins.parse(expression) if term.name != "nope"]
    if "nope" in expression and any(term.name == "nope" and term.settings for term in plugins.parse(expression)):
        raise UserError("nope is the empty scheme and has no settings.")
    kinds = [(term, plugins.find("methods", term.name)) for term in terms]
    terms = [Term(term.name, plugins.check(kind, term)) for term, kind in kinds]
    _at_most_one(kinds, "encodes the embeddings", lambda kind: issubclass(kind, InputEncoding))
    _at_most_one(kinds, "rotates queries and keys", lambda kind: issubclass(kind, QueryKeyEncoding) and kind.rotation)
    _at_most_one(kinds, "rewrites the scores", lambda kind: issubclass(kind, ScoreMap))
    _at_most_one(kinds, "has several maps", lambda kind: issubclass(kind, HeadMerge) and kind.maps > 1)
    return terms


def spell(expression: str) -> str:
    """The expression in its one spelling: `alibi+ nope` -> `alibi`, the empty scheme -> `nope`."""
    return " + ".join(str(term) for term in parse(expression)) or "nope"


def build_scheme(
    expression: str,
    *,
    heads: int,
    groups: int | None = None,
    head_width: int | None = None,
    width: int | None = None,
    layer: int = 0,
    layers: int = 1,
    context: int = 512,
    positions: int | None = None,
    embedding_scale: float = 0.02,
    soft_cap: float | None = None,
    shared: Shared | None = None,
) -> Scheme:
    """Build the scheme of one layer. What is not given is derived from the rest.

    Args:
        expression: such as `"kerple + dape_v2(kernel=3) + stable_mask"`.
        heads: of the plain transformer; a merge of several maps divides them its own way.
        groups: key and value heads of the plain transformer; by default `heads`.
        head_width: of queries and keys; by default width / heads, or 64.
        width: of the model; by default heads · head_width.
        layer, layers: the place in the model, from 0.
        context: tokens of the longest sequence trained on.
        positions: the largest position + 1 that a table must hold; by default `context`.
        embedding_scale: standard deviation of a fresh token embedding.
        soft_cap: of the attention scores, before any map and bias.
        shared: methods that all layers share, by name; a new one is put in.

    Raises:
        UserError: an unknown name or setting, or methods that cannot be combined.
    """
    terms = parse(expression)
    groups = heads if groups is None else groups
    if groups < 1 or heads % groups:
        raise UserError(f"groups ({groups}) must divide heads ({heads}); try groups={heads}.")
    if head_width is None:
        if width is not None and width % heads:
            raise UserError(f"heads ({heads}) must divide width ({width}), or head_width must be given.")
        head_width = 64 if width is None else width // heads
    counts = Heads(heads, groups, groups, head_width, head_width)
    for term in terms:
        kind = plugins.find("methods", term.name)
        if issubclass(kind, HeadMerge) and kind.maps > 1:
            counts = kind.heads(heads, groups, head_width)
    site = Site(
        heads=counts,
        width=heads * head_width if width is None else width,
        layer=layer,
        layers=layers,
        context=context,
        positions=context if positions is None else positions,
        biased=any(issubclass(plugins.find("methods", term.name), ScoreBias) for term in terms),
        embedding_scale=embedding_scale,
    )
    share_bias = any(term.settings.get("share_bias", False) for term in terms)
    methods = [_build(term, site, share_bias, {} if shared is None else shared) for term in terms]
    scheme = Scheme(spell(expression), counts, methods, soft_cap=soft_cap)
    if scheme.maps and any(bias.hides for bias in scheme.biases):
        raise UserError(f"{expression!r} hides keys by its bias, which the map that reads the bias cannot know.")
    return scheme


def _build(term: Term, site: Site, share_bias: bool, shared: Shared) -> Method:
    kind = plugins.find("methods", term.name)
    if share_bias and issubclass(kind, ScoreBias | Sink):
        site = site.sharing_bias()
    if not term.settings.get("shared", kind.shared):
        return plugins.build("methods", term, site)
    if str(term) not in shared:
        shared[str(term)] = plugins.build("methods", term, site)
    return shared[str(term)]


def _at_most_one(kinds: list[tuple[Term, Any]], does: str, test: Callable[[Any], bool]) -> None:
    found = [term.name for term, kind in kinds if test(kind)]
    if len(found) > 1:
        raise UserError(f"{found[0]!r} and {found[1]!r} cannot be combined: each {does}, and a scheme has at most one.")
