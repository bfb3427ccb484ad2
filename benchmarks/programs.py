"""Compiles all programs for a GPU that need not be there, and tells what they take:  python -m benchmarks.programs

Registers and what is spilled from them, bytes of shared memory, warps, and tiles that are loaded ahead, one row for
each sample. Fails where a program does not compile or wants more shared memory than a multiprocessor lends it.
"""

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from lookfar.kernels import programs
from lookfar.kernels.programs.samples import Sample

LENT = 227 * 1024  # bytes of shared memory that a block of threads may have on sm_90
ALIGNED = 16  # what addresses and strides are multiples of, as in ordinary calls


def main() -> int:
    """Print a row for every sample; 1 where one is of no use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability, such as 90 for sm_90")
    parser.add_argument("--only", default="", help="samples whose name contains this")
    options = parser.parse_args()
    failed = []
    for sample in _samples():
        if options.only not in sample.name:
            continue
        try:
            row = measure(sample, options.arch)
        except Exception as error:  # whatever a compiler raises
            failed.append(f"{sample.name} does not compile: {_innermost(error)}")
            continue
        print("  ".join(f"{key} {value}" for key, value in {"name": sample.name, **row}.items()), flush=True)
        if row["shared_bytes"] > LENT:
            failed.append(f"{sample.name} wants {row['shared_bytes']:,} bytes of shared memory; there are {LENT:,}.")
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


def measure(sample: Sample, arch: int) -> dict[str, Any]:
    """What one program takes on sm_`arch`."""
    names = sample.program.arg_names
    signature = {name: sample.types.get(name, "constexpr") for name in names}
    aligned = [
        (place,)
        for place, name in enumerate(names)
        if signature[name].startswith("*") or (name.startswith("stride") and signature[name] == "i32")
    ]
    source = ASTSource(
        fn=sample.program,
        signature=signature,
        constexprs=sample.constants,
        attrs={place: [["tt.divisibility", ALIGNED]] for place in aligned},
    )
    options = {"num_warps": sample.warps, "num_stages": sample.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = _registers(compiled.asm["ptx"], arch)
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "warps": sample.warps,
        "stages": sample.stages,
    }


def _innermost(error: BaseException) -> BaseException:
    """What went wrong first: functions that call one another each tell of it."""
    return error if error.__cause__ is None else _innermost(error.__cause__)


def _registers(ptx: str, arch: int) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills, as the assembler tells them."""
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target is not None, "every program names its target"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.ptx"
        file.write_text(ptx, encoding="utf-8")
        asked = [get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={target[1]}", file.name, "-o", "out"]
        told = subprocess.run(asked, check=True, capture_output=True, text=True, cwd=folder).stderr
    registers = re.search(r"Used (\d+) registers", told)
    stores = re.search(r"(\d+) bytes spill stores", told)
    assert registers is not None and stores is not None, told
    return int(registers[1]), int(stores[1])


def _samples() -> list[Sample]:
    modules = (importlib.import_module(f"{programs.__name__}.{each.name}") for each in _modules())
    return [sample for module in modules for sample in module.samples()]


def _modules() -> list[pkgutil.ModuleInfo]:
    return [each for each in pkgutil.iter_modules(programs.__path__) if each.name != "samples"]


if __name__ == "__main__":
    sys.exit(main())
