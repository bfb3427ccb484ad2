"""The definition itself as a kernel: the full square of scores, for any scheme."""

from jaxtyping import Float
from torch import Tensor

from lookfar.attention import reference
from lookfar.attention.scheme import Scheme
from lookfar.kernels.base import Call, Kernel
from lookfar.sight import Sight


class Reference(Kernel):
    """Computes the whole square of scores at once. Takes anything; memory grows with queries × keys."""

    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        return None

    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        return reference.attend(queries, keys, values, sight, scheme)
