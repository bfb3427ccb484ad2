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

TOLD = ("distance", "flex")  # made for a GPU, and after `reference` never taken: `explain` says why
LONG = ("sdpa", "strips", "square", "row", "slots", "chunked", "reference", *TOLD)
SHORT = ("square", "sdpa", "strips", "row", "slots", "chunked", "reference", *TOLD)
SINGLE = ("row", "sdpa", "square", "strips", "slots", "chunked", "reference", *TOLD)
SLOTS = ("slots", "sdpa", "square", "strips", "row", "chunked", "reference", *TOLD)
FLASH = ("sdpa", "distance", "row", "flex", "square", "slots", "chunked", "reference", "strips")  # a GPU's, if alone
GPU = ("distance", "sdpa", "row", "flex", "square", "slots", "chunked", "reference", "strips")
SHORTEST_FLASH = 1024  # keys from which a flash kernel on a CPU trains at least as fast as the square in bfloat16


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
    return next(
        each for name in preference(call, bare=_bare(scheme)) if (each := _kernel(name)).refusal(scheme, call) is None
    )


def explain(scheme: Scheme, call: Call) -> list[tuple[str, str | None]]:
    """Each kernel in order of preference with the reason of its refusal; None: willing, and the first such is taken."""
    return [(name, _kernel(name).refusal(scheme, call)) for name in preference(call, bare=_bare(scheme))]


def preference(call: Call, *, bare: bool = True) -> tuple[str, ...]:
    """Kernels in the order in which they are asked; `bare`: nothing is added to scores, nothing joins the softmax."""
    if call.slots:
        return SLOTS
    if call.device == "cuda":
        alone = bare and call.plain and call.last and call.queries in (1, call.keys)
        return FLASH if alone else GPU
    if call.queries == 1 and call.device == "cpu":
        return SINGLE
    short = call.device == "cpu" and call.keys < SHORTEST_FLASH and call.queries > 1
    return SHORT if short and (call.dtype == torch.bfloat16 or call.keys <= SHORTEST_FLASH // 4) else LONG


def _bare(scheme: Scheme) -> bool:
    return not (scheme.biases or scheme.sinks or scheme.soft_cap is not None)


@cache
def _kernel(name: str) -> Kernel:
    return plugins.find("kernels", name)()


def _named(name: str, scheme: Scheme, call: Call) -> Kernel:
    if reason := _kernel(name).refusal(scheme, call):
        raise UserError(f"The kernel {name} does not take this call: {reason}.")
    return _kernel(name)
