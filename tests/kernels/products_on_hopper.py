"""Compiles the products' kernels for a Hopper GPU, at the shapes of an 8B model, and prints what is amiss: run by
test_products.py in a process without Triton's interpreter."""

import re

from llama.model.kernels import products
from tests.kernels.compiling import SHARED_BYTES, compile_for_hopper

# x, W, scale and low, and the shares: as Triton writes them. x_scale is always float32.
KINDS = {"float": ("*bf16", "*bf16", "*bf16", "*fp32"), "int8": ("*i8", "*i8", "*fp32", "*i32"),
         "int4": ("*i8", "*u8", "*fp16", "*fp32")}


def main():
    for name, tiles in products.TILES.items():
        kind = name.split()[0]
        x, w, scale, parts = KINDS[kind]
        types = {"x": x, "x_scale": "*fp32", "w": w, "scale": scale, "low": scale, "parts": parts, "rows": "i32:1",
                 "outs": "i32", "ins": "i32", "share": "i32"}
        constants = {"ROWS": tiles.rows, "OUTS": tiles.outs, "COLUMNS": tiles.columns}
        kernel = products._int4_dots if kind == "int4" else products._dots
        made = compile_for_hopper(kernel, types, constants, num_warps=tiles.warps, num_stages=tiles.stages)
        wide = re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg.* 0x10", made.ptx)
        for what, wrong in ((f"{made.spills} bytes spill", made.spills),
                            (f"{made.shared} bytes shared", made.shared > SHARED_BYTES),
                            ("no wgmma", tiles.rows > 1 and "wgmma.mma_async" not in made.ptx),
                            # Of int4 they are narrower yet: 16 bytes are one group, and Triton deals a row out to more threads.
                            ("no 16-byte loads", kind != "int4" and not wide)):
            if wrong:
                print(f"{name}: {what}")


if __name__ == "__main__":
    main()
