"""Compiles the element-wise kernels for a Hopper GPU, at the shapes of an 8B model, and prints what is amiss: run by
test_fused.py in a process without Triton's interpreter."""

import re

from llama.model.kernels import fused
from tests.kernels.compiling import compile_for_hopper

HIDDEN, INTERMEDIATE = 4096, 14336
NORMS = {"_norm_scale": "x", "_rms_norm": "x weight y", "_add_norm": "x delta weight total y"}


def main():
    for dtype in ("bf16", "fp16", "fp32"):
        each = 2 if dtype == "fp32" else 1  # loads of 16 bytes for 8 elements
        for name, pointers in NORMS.items():
            constants = fused.row_options(HIDDEN)
            options = {option: constants.pop(option) for option in ("num_warps", "enable_fp_fusion")}
            types = dict.fromkeys(pointers.split(), f"*{dtype}") | {"eps": "fp32"}
            types |= {"scale": "*fp32"} if name == "_norm_scale" else {}
            made = compile_for_hopper(getattr(fused, name), types, constants, **options)
            stores = [one for one in pointers.split() if one in ("total", "y")]
            check(f"{name}, {dtype}", made, each * (len(pointers.split()) - len(stores)), each * len(stores))
            if "fma" in made.ptx:
                print(f"{name}, {dtype}: it is the compiler who says which sums are rounded once")
        types = dict.fromkeys(("gate", "up", "y"), f"*{dtype}") | {"gate_stride": "i32", "up_stride": "i32"}
        made = compile_for_hopper(fused._swiglu, types, {"size": INTERMEDIATE, "block": fused._SWIGLU_BLOCK},
                                  num_warps=fused._SWIGLU_WARPS)
        check(f"_swiglu, {dtype}", made, 2 * each, each)


def check(what, made, loads, stores):
    """So many loads and stores of 16 bytes each, and none that are smaller."""
    found = [len(re.findall(rf"{kind}\.global\S*\.v4\.b32", made.ptx)) for kind in ("ld", "st")]
    if found != [loads, stores]:
        print(f"{what}: {found[0]} loads and {found[1]} stores of 16 bytes, not {loads} and {stores}")
    if made.spills:
        print(f"{what}: {made.spills} bytes of registers spill")


if __name__ == "__main__":
    main()
