"""Ways to compute attention: the first willing kernel of a preference list takes a call."""

from lookfar.kernels.base import Call, Kernel
from lookfar.kernels.dispatch import attend, choose, explain

__all__ = ["Call", "Kernel", "attend", "choose", "explain"]
