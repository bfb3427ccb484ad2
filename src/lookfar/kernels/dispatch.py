"""Asks the kernels in order of preference and takes the first willing one."""

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from lookfar import plugins
from lookfar.attention.scheme import Scheme
from lookfar.errors import UserError
from lookfar.kernels.base import Call, Kernel
from lookfar.sight import Sight

TOLD = ("distance", "dape", "flex")  # made for a GPU, and after `reference` never taken: `explain` says why
LONG = ("strips", "sdpa", "square", "row", "slots", "chunked", "reference", *TOLD)
SHORT = ("square", "strips", "sdpa", "row", "slots", "chunked", "reference", *TOLD)
SINGLE = ("row", "sdpa", "square", "slots", "chunked", "reference", "strips", *TOLD)  # strips lay out all keys first
SLOTS = ("slots", "strips", "sdpa", "square", "row", "chunked", "reference", *TOLD)
FLASH = ("sdpa", "distance", "row", "flex", "dape", "square", "slots", "chunked", "reference", "strips")  # a GPU's
GPU = ("distance", "sdpa", "row", "flex", "dape", "square", "slots", "chunked", "reference", "strips")
FEW = 8  # queries; fewer go where a single one does
SHORTEST = {  # keys from which strips are faster than the square, as `python -m benchmarks --only choices` tells
    torch.bfloat16: {"by distance": 2048, "another bias": 512},
    torch.float32: {"by distance": 256, "another bias": 256},
}


def attend(
    queries: Float[Tensor, "b h q e"],
    keys: Float[Tensor, "b g k e"],
    values: Float[Tensor, "b g2 k v"],
    sight: Sight,
    scheme: Scheme,
    kernel: str | None = None,
) -> Float[Tensor, "b h q v"]:
    """Attention by the first willing kernel, or by the one that is named. Queries and keys are already encoded.

    Raises:
        UserError: the named kernel refuses, or a method is not exact under this sight; the reason is told.
    """
    if reason := scheme.refusal(sight):
        raise UserError(reason)
    call = Call.of(queries, keys, values, sight, scheme)
    chosen = choose(scheme, call) if kernel is None else _named(kernel, scheme, call)
    return chosen.attend(queries, keys, values, sight, scheme)


def choose(scheme: Scheme, call: Call) -> Kernel:
    """The first kernel of the preference list that does not refuse."""
    return next(each for name in preference(scheme, call) if (each := _kernel(name)).refusal(scheme, call) is None)


def explain(scheme: Scheme, call: Call) -> list[tuple[str, str | None]]:
    """Each kernel in order of preference with the reason of its refusal; None: willing, and the first such is taken."""
    return [(name, _kernel(name).refusal(scheme, call)) for name in preference(scheme, call)]


def preference(scheme: Scheme, call: Call) -> tuple[str, ...]:
    """Kernels in the order in which they are asked."""
    if call.slots:
        return SLOTS
    if call.device == "cuda":
        bare = not (scheme.biases or scheme.sinks or scheme.soft_cap is not None)
        return FLASH if bare and call.plain and call.last and call.queries in (1, call.keys) else GPU
    if call.queries < FEW:
        return SINGLE
    kind = "by distance" if scheme.by_distance else "another bias"
    return SHORT if call.keys < SHORTEST.get(call.dtype, SHORTEST[torch.float32])[kind] else LONG


@cache
def _kernel(name: str) -> Kernel:
    return plugins.find("kernels", name)()


def _named(name: str, scheme: Scheme, call: Call) -> Kernel:
    if reason := _kernel(name).refusal(scheme, call):
        raise UserError(f"The kernel {name} does not take this call: {reason}.")
    return _kernel(name)
