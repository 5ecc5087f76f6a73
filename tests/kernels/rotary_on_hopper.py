"""Compiles the rotation with the cache's write for a Hopper GPU, with the heads of an 8B model, and prints what is amiss: run
by test_rotary.py in a process without Triton's interpreter."""

from llama.model.kernels import rotary
from tests.kernels.compiling import compile_for_hopper

KEPT = {None: "*bf16", "int8": "*i8", "fp8": "*fp8e4nv"}  # as Triton writes them


def main():
    for quantised, kept in KEPT.items():
        types = dict.fromkeys(("q", "k", "v", "q_out", "k_out"), "*bf16") | {"cos": "*fp32", "sin": "*fp32", "slots": "*i64"} \
            | dict.fromkeys(("keys", "values"), kept) | dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32")
        constants = {"GROUP": 4, "GROUP_ROWS": 4, "KV_HEADS": 8, "HALF": 64, "LARGEST": rotary._LARGEST[quantised]}
        (constants if quantised is None else types).update(
            dict.fromkeys(("key_scales", "value_scales"), None if quantised is None else "*fp32"))
        made = compile_for_hopper(rotary._rotate_and_write, types, constants, **rotary.OPTIONS)
        if made.spills or "fma" in made.ptx:
            print(f"{quantised}: {made.spills} bytes spill, or a product and a sum are rounded once")


if __name__ == "__main__":
    main()
