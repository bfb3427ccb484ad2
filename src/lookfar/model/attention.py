"""The attention layer: projections around a scheme, and the functional face of the same."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar import kernels
from lookfar.attention.scheme import Scheme, build_scheme
from lookfar.errors import UserError
from lookfar.model.cache import LayerCache
from lookfar.sight import Sight


class Attention(nn.Module):
    """Self-attention under any scheme, to be used alone or dropped into another model: `[b t d]` -> `[b t d]`."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        scheme: str | Scheme = "rope",
        groups: int | None = None,
        head_width: int | None = None,
        window: int | None = None,
        qk_norm: bool = False,
        context: int = 512,
        kernel: str | None = None,
    ) -> None:
        """Build the layer.

        Args:
            width: of the model, d.
            heads: of the plain transformer; they must divide `width` unless `head_width` is given.
            scheme: an expression, or a scheme that is already built (its own head counts then hold).
            groups: key and value heads; by default `heads`.
            window: how many tokens a query sees, itself included.
            qk_norm: normalise queries and keys before they are encoded.
            context: the trained length that a scheme may refer to.
            kernel: the name of a kernel; by default the first willing one.
        """
        super().__init__()
        if isinstance(scheme, str):
            scheme = build_scheme(
                scheme, heads=heads, groups=groups, head_width=head_width, width=width, context=context
            )
        self.scheme, self.window, self.kernel = scheme, window, kernel
        counts = scheme.heads
        self.sizes = [
            counts.score_heads * counts.head_width,
            counts.key_heads * counts.head_width,
            counts.value_heads * counts.value_width,
        ]
        self.project = nn.Linear(width, sum(self.sizes), bias=False)
        self.output = nn.Linear(counts.heads * counts.value_width, width, bias=False)
        self.query_norm = nn.RMSNorm(counts.head_width, eps=1e-6) if qk_norm else None
        self.key_norm = nn.RMSNorm(counts.head_width, eps=1e-6) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        *,
        sight: Sight | None = None,
        cache: LayerCache | None = None,
        step: int | None = None,
    ) -> Float[Tensor, "b q d"]:
        """What each token receives. Without a sight, tokens are consecutive and see all before them.

        A sight of fewer queries than tokens asks for the last of them; the others only give keys and values. With a
        cache the keys and values of `x` are appended to it, those of slots excepted, and the sight covers all keys in
        it and the slots. With a `step`, each line of `x` is the one before it, moved on by so many tokens.
        """
        if sight is None:
            past = 0 if cache is None else cache.length
            sight = Sight.causal(past + x.shape[1], queries=x.shape[1], window=self.window, device=x.device)
        queries, keys, values = self.encoded(x, sight, step)
        if cache is not None and not self.scheme.once:
            raise UserError(
                f"{self.scheme.expression} encodes all keys anew when the sequence grows, so none can be cached; "
                "pass the whole sequence at every step, or choose a scaling that is fixed, such as ntk or yarn."
            )
        if cache is not None:
            keys, values = _remembered(cache, keys, values, slots=sight.asking)
        outputs = kernels.attend(queries, keys, values, sight, self.scheme, self.kernel)
        return self.output(self.scheme.merge(outputs, x[:, -sight.queries :]).transpose(1, 2).flatten(2))

    def _projected(self, x: Float[Tensor, "b t d"], asking: int, step: int | None) -> tuple[Tensor, ...]:
        """The queries of the last tokens, and the keys and values of all; what lines share is projected once."""
        if step is not None and asking == x.shape[1] >= step and len(x) > 1:
            text = torch.cat([x[0], x[1:, -step:].flatten(0, 1)])
            lines = self.project(text).unfold(0, x.shape[1], step).mT  # b p t -> b t p
            return lines.split(self.sizes, dim=-1)
        if asking == x.shape[1]:
            return self.project(x).split(self.sizes, dim=-1)
        of_queries, of_others = self.project.weight.split([self.sizes[0], sum(self.sizes[1:])])
        return F.linear(x[:, -asking:], of_queries), *F.linear(x, of_others).split(self.sizes[1:], dim=-1)

    def encoded(
        self, x: Float[Tensor, "b t d"], sight: Sight, step: int | None = None
    ) -> tuple[Float[Tensor, "b h q e"], Float[Tensor, "b g t e"], Float[Tensor, "b g2 t v"]]:
        """Queries of the tokens that ask, keys and values of all: what a kernel is given, and a cache is made of."""
        counts = self.scheme.heads
        queries, keys, values = self._projected(x, sight.queries, step)
        queries = _normed(self.query_norm, queries.unflatten(-1, (counts.score_heads, -1)).transpose(1, 2))
        keys = _normed(self.key_norm, keys.unflatten(-1, (counts.key_heads, -1)).transpose(1, 2))
        values = values.unflatten(-1, (counts.value_heads, -1)).transpose(1, 2)
        new = sight.query_positions if sight.queries == x.shape[1] else sight.key_positions[:, -x.shape[1] :]
        return self.scheme.queries(queries, sight.query_positions), self.scheme.keys(keys, new), values


def attend(
    queries: Float[Tensor, "b h q e"],
    keys: Float[Tensor, "b g k e"],
    values: Float[Tensor, "b g2 k v"],
    *,
    scheme: str | Scheme,
    sight: Sight | None = None,
    inputs: Float[Tensor, "b q d"] | None = None,
    kernel: str | None = None,
) -> Float[Tensor, "b h2 q v"]:
    """Attention from bare queries, keys and values: encode them, attend, merge the maps.

    Args:
        queries, keys, values: projected, not yet encoded; fewer queries than keys are the last ones.
        scheme: an expression, or a built scheme; one with parameters of its own must be built, so that they persist.
        sight: who sees whom and the positions; by default causal, numbered 0, 1, 2, …
        inputs: what the layer was given, for merges that read it.
        kernel: the name of a kernel; by default the first willing one.

    Raises:
        UserError: head counts that do not fit the scheme, a kernel that refuses, a merge without its inputs.
    """
    if isinstance(scheme, str):
        expression, heads, groups = scheme, queries.shape[1], values.shape[1]
        scheme = build_scheme(expression, heads=heads, groups=groups, head_width=queries.shape[-1])
        if any(True for _ in scheme.parameters()):
            raise UserError(f"{expression!r} has parameters: build it once with lookfar.build_scheme and pass that.")
        scheme = scheme.to(queries.device)
    counts = scheme.heads
    given = {"queries": queries.shape[1], "keys": keys.shape[1], "values": values.shape[1]}
    wanted = {"queries": counts.score_heads, "keys": counts.key_heads, "values": counts.value_heads}
    if given != wanted:
        raise UserError(f"The scheme {scheme.expression!r} was built for heads {wanted}; these tensors have {given}.")
    if sight is None:
        sight = Sight.causal(keys.shape[2], queries=queries.shape[2], device=queries.device)
    queries = scheme.queries(queries, sight.query_positions)
    keys = scheme.keys(keys, sight.key_positions)
    return scheme.merge(kernels.attend(queries, keys, values, sight, scheme, kernel), inputs)


def _remembered(
    cache: LayerCache, keys: Float[Tensor, "b g t e"], values: Float[Tensor, "b g2 t v"], slots: int
) -> tuple[Float[Tensor, "b g k e"], Float[Tensor, "b g2 k v"]]:
    """All keys and values, the cached ones first; new text is stored, slots are only shown."""
    if not slots:
        return cache.append(keys, values)
    text = keys.shape[2] - slots
    if text:
        cache.append(keys[:, :, :text], values[:, :, :text])
    return cache.show(keys[:, :, text:], values[:, :, text:])


def _normed(norm: nn.RMSNorm | None, heads: Float[Tensor, "b c t e"]) -> Float[Tensor, "b c t e"]:
    """Each head normalised in the type of the norm's weight, which autocast leaves wide."""
    return heads if norm is None else norm(heads.to(norm.weight.dtype)).to(heads.dtype)


def cast(dtype: str) -> torch.dtype:
    """The torch type of a configured name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[dtype]
