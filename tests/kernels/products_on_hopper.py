"""Compiles the products' kernels for a Hopper GPU, at the shapes of an 8B model, and prints what is amiss: run by
test_products.py in a process without Triton's interpreter."""

import re

from llama.model.kernels import products
from tests.kernels.compiling import SHARED_BYTES, compile_for_hopper

# W, and the sums of a part, as Triton writes them.
KINDS = {"float": ("*bf16", "*fp32"), "int8": ("*i8", "*i32"), "fp8": ("*fp8e4nv", "*fp32"), "int4": ("*u8", "*fp32")}


def product(name, tiles, is_part):
    """A product's kernel as `_launch` would call it, for a part of the columns or for all."""
    kind, how = name.split()
    w, sums = KINDS[kind]
    is_int4 = kind == "int4"
    if how == "one" and kind in ("int8", "int4"):
        w = "*i32"
    types = {"x": "*i8" if is_int4 and how != "one" else w, "w": w, "out": sums if is_part else "*bf16", "rows": "i32:1",
             "outs": "i32", "ins": "i32", "part": "i32"}
    constants = {"ROWS": tiles.rows, "OUTS": tiles.outs, "COLUMNS": tiles.columns, "DP4A": True}
    scales = {"x_scale": "*fp32", "scale": "*fp16", "low": "*fp16"} if is_int4 else {"x_scale": "*fp32", "scale": "*fp32"}
    has_scales = is_int4 or kind != "float" and not is_part
    (types if has_scales else constants).update(scales if has_scales else dict.fromkeys(scales))
    return compile_for_hopper(products._int4_products if is_int4 else products._products, types, constants,
                              num_warps=tiles.warps, num_stages=tiles.stages)


def quantise(dtype, size):
    groups, largest = (32 if size == 32 else 1), 127.0 if dtype == "*i8" else 448.0
    types = {"x": "*bf16", "q": dtype, "scale": "*fp32", "num_groups": "i32:1", "size": "i32"}
    return compile_for_hopper(products._quantise, types, {"GROUPS": groups, "BLOCK": 1 << (size - 1).bit_length(),
                              "LARGEST": largest}, num_warps=4 if size <= 4096 else 8)


def add(sums, is_scaled):
    """The kernel that adds parts, of integers times both scales."""
    types = {"parts": sums, "y": "*bf16", "rows": "i32:1", "outs": "i32"}
    constants = {"COUNT": 4, "BLOCK": 1024}
    (types if is_scaled else constants).update(dict.fromkeys(("x_scale", "scale"), "*fp32" if is_scaled else None))
    return compile_for_hopper(products._add, types, constants, num_warps=4)


def main():
    for name, tiles in products.TILES.items():
        kind, how = name.split()
        for is_part in (False, True):
            made = product(name, tiles, is_part)
            wide = re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg.* 0x10", made.ptx)
            for what, wrong in ((f"{made.spills} bytes spill", made.spills),
                                (f"{made.shared} bytes shared", made.shared > SHARED_BYTES),
                                ("no wgmma", tiles.rows > 1 and "wgmma.mma_async" not in made.ptx),
                                ("no dp4a", how == "one" and kind.startswith("int") and "dp4a" not in made.ptx),
                                # 128 lines of int4 are 8 bytes a thread; but these compute.
                                ("no 16-byte loads", not wide and name != "int4 many")):
                if wrong:
                    print(f"{name}, is_part={is_part}: {what}")
    for dtype, size in (("*i8", 32), ("*i8", 4096), ("*fp8e4nv", 4096), ("*fp8e4nv", 14336)):
        made = quantise(dtype, size)
        if made.spills:
            print(f"rounding {size} to {dtype}: {made.spills} bytes spill")
    for sums, is_scaled in (("*fp32", False), ("*i32", True)):
        made = add(sums, is_scaled)
        if made.spills or not re.search(r"ld\.global\S*\.v4\.b32", made.ptx):
            print(f"adding parts of {sums}: {made.spills} bytes spill, or no 16-byte loads")


if __name__ == "__main__":
    main()
