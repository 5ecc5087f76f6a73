"""Compiles attention's kernels for a Hopper GPU, at the shapes of an 8B model, and prints what is amiss: run by
test_paged.py in a process without Triton's interpreter."""

import re

from llama.model.kernels import paged
from tests.kernels.compiling import SHARED_BYTES, compile_for_hopper

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
NUMBERS = {name: "i32:1" for name in ("table_stride", "splits", "most_parts", "tiles")}
POINTERS = {"q": "*bf16", "out": "*bf16", "rows": "*i32", "lengths": "*i32", "table": "*i32"}


def attend(cut, is_decode, deterministic, splits, kept):
    """`_attend` as `attend` would call it."""
    queries = cut.rows // GROUP
    types = POINTERS | NUMBERS | {"scale": "fp32", "keys": f"*{kept}", "values": f"*{kept}"}
    constants = {"GROUP": GROUP, "QUERIES": queries, "TILE": cut.positions, "PART": paged.PART * deterministic,
                 "KV_HEADS": KV_HEADS, "HEAD_DIM": HEAD_DIM, "ROWS": cut.rows, "BLOCK_SIZE": 16 if is_decode else 1}
    for names, present, kind in ((("key_scales", "value_scales"), kept != "bf16", "*fp32"),
                                 (("parts", "sums"), splits, "*fp32"), (("counts", "first"), not is_decode, "*i32")):
        (types if present else constants).update(dict.fromkeys(names, kind if present else None))
    types.pop("tiles")
    return compile_for_hopper(paged._attend, types, constants, num_warps=cut.warps, num_stages=cut.stages,
                              enable_fp_fusion=not deterministic)


def join(deterministic):
    types = {name: POINTERS[name] for name in ("out", "rows", "lengths")} | NUMBERS | {"parts": "*fp32", "sums": "*fp32"}
    types.pop("table_stride")
    constants = {"counts": None, "GROUP": GROUP, "QUERIES": 4, "TILE": 64, "PART": paged.PART * deterministic,
                 "HEADS": KV_HEADS * GROUP, "HEAD_DIM": HEAD_DIM}
    return compile_for_hopper(paged._join, types, constants, num_warps=1, enable_fp_fusion=not deterministic)


def main():
    for kept in ("bf16", "fp8e4nv", "i8"):
        chunks = paged._CHUNKS if kept == "bf16" else paged._CHUNKS_OF_8_BITS
        for cut, is_decode, deterministic in ((paged._DECODES, True, False), (chunks, False, False),
                                              (paged._DETERMINISTIC, True, True), (paged._DETERMINISTIC, False, True)):
            splits = cut is paged._DECODES
            made = attend(cut, is_decode, deterministic, splits, kept)
            product = "mma.sync" if cut is paged._DECODES else "wgmma.mma_async"
            under_way = max(map(int, re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", made.ptx)), default=0)
            # Triton 3.6 spills nothing; 3.9, in deterministic mode, three doubles between parts.
            problems = [what for what, wrong in (
                ("registers spill", made.spills > 32), ("too much shared memory", made.shared > SHARED_BYTES),
                ("two programs do not fit an SM", splits and 2 * made.shared > SHARED_BYTES),
                (f"no {product}", product not in made.ptx), ("no tiles under way", under_way < 2),
                ("no 16-byte copies", not re.search(r"cp\.async\.cg.* 0x10", made.ptx))) if wrong]
            for problem in problems:
                print(f"{kept}, {cut}, is_decode={is_decode}: {problem}")
    for deterministic in (False, True):
        made = join(deterministic)
        if made.spills or "v4.f32" not in made.ptx and "v4.b32" not in made.ptx and " 0x10" not in made.ptx:
            print(f"join, deterministic={deterministic}: {made.spills} bytes spill, or no vectors")


if __name__ == "__main__":
    main()
