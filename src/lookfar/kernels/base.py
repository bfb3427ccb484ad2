"""What a kernel is: a way to compute attention that says which schemes and calls it takes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lookfar.attention.scheme import Scheme
from lookfar.sight import Sight


@dataclass(frozen=True)
class Call:
    """The facts of a call that decide which kernel can take it."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    queries: int = 128
    keys: int = 128
    batch: int = 1
    gradients: bool = True  # whether something needs a gradient
    plain: bool = True  # the order of tokens alone decides who sees whom
    last: bool = True  # the queries are the last of the keys
    consecutive: bool = True  # positions are 0, 1, 2, …
    steady: bool = True  # the distance of tokens that see each other is the number of places between them
    neighbours: bool = True  # the keys that a query sees lie side by side
    whole: bool = True  # positions are whole numbers
    causal: bool = True  # nothing ahead is seen
    slots: bool = False  # some queries are slots, which see a part of the text and themselves

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, values: Tensor, sight: Sight, scheme: Scheme) -> "Call":
        """The facts of a call with these tensors."""
        return cls(
            device=queries.device.type,
            dtype=queries.dtype,
            queries=queries.shape[2],
            keys=keys.shape[2],
            batch=queries.shape[0],
            gradients=torch.is_grad_enabled()
            and any(each.requires_grad for each in (queries, keys, values, *scheme.parameters())),
            plain=sight.plain,
            last=sight.last,
            consecutive=sight.consecutive and sight.text is None,
            steady=not scheme.biases or sight.steady,  # which reads all positions
            neighbours=not sight.scattered,
            whole=not (sight.query_positions.is_floating_point() or sight.key_positions.is_floating_point()),
            causal=not sight.ahead,
            slots=sight.asking > 0,
        )


class Kernel(ABC):
    """A way to compute attention."""

    @abstractmethod
    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        """Why not, in words; None: willing, and then equal to the reference in outputs and gradients."""

    @abstractmethod
    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        """As `attention.reference.attend`."""
