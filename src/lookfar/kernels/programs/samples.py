"""Samples of programs: the types and constants with which each is compiled ahead of time and looked at."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One program as it is compiled for a GPU that need not be there.

    Every module of this package has a function `samples() -> list[Sample]`.
    """

    name: str  # such as "distance forward, bfloat16, width 64"
    program: Any  # what @triton.jit made
    types: dict[str, str]  # of each argument that is not constant: "*bf16", "*fp32", "i32", "fp32"
    constants: dict[str, Any] = field(default_factory=dict)  # of each argument that is
    warps: int = 4
    stages: int = 2
