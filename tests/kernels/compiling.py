"""Compile kernels for a Hopper GPU, as the H200 has, on a machine that has none: what does not compile is found, and so
are registers that spill and shared memory that does not suffice.

Triton's own compiler does it, with the assembler that its package brings. Only in a process without TRITON_INTERPRET,
for that makes `triton.jit` something else.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10  # that a block may have there


@dataclass(frozen=True)
class Compiled:
    """What came out. spills: bytes of registers that went to local memory; shared: bytes."""

    ptx: str
    spills: int
    shared: int
    registers: int


def compile_for_hopper(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], **options: Any) -> Compiled:
    """types: by argument, as Triton writes them: "*bf16", "i32", "fp32"; pointers and "i32" are taken as multiples of 16,
    as Triton finds them to be in a real call, "i32:1" is not. options: num_warps, num_stages."""
    signature = {name: types[name].split(":")[0] if name in types else "constexpr" for name in kernel.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names)
               if name in types and (types[name][0] == "*" or types[name] in ("i32", "i64"))}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    compiled = triton.compile(source, target=HOPPER, options=options)
    usage = _usage(compiled.asm["cubin"])
    return Compiled(compiled.asm["ptx"], usage["LOCAL"] + usage["STACK"], compiled.metadata.shared, usage["REG"])


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the kernel, as cuobjdump tells them."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([program, "-res-usage", file.name], check=True, capture_output=True, text=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout + told.stderr)}
