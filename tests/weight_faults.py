"""More deliberate faults of `tests.mutation`: in the weight formats, their kernels, and checkpoints that hold them."""

from tests.faults import Fault

_FAULTS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "model/formats.py": (
        ("a group of int4 takes its neighbour's scale", "q, scale, low = best\n    return",
         "q, scale, low = best\n    scale = scale.roll(1, 1)\n    return"),
        ("int4 always takes the whole range", "_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)", "_SHRINKS = (1.0,)"),
        ("int4 without an end below", "q = torch.where(scale > 0, (groups - low) / scale, 0.0)",
         "q = torch.where(scale > 0, groups / scale, 0.0)"),
        ("int8 rounds down", "(values * factor).round()", "(values * factor).floor()"),
        ("int8 with 7 bits", "torch.full_like(largest, 127) / largest", "torch.full_like(largest, 63) / largest"),
        ("one scale for all tokens", "x_q, x_scale = quantise_int8(x)\n",
         "x_q, x_scale = quantise_int8(x.view(1, -1))\n            x_q, x_scale = x_q.view(x.shape), x_scale.expand(len(x))\n"),
        ("x is not rounded for int4", "F.linear((x_q * x_scale[..., None]).flatten(1),", "F.linear(x.float(),"),
        ("x is not rounded for bf16", "F.linear(x.bfloat16().float(),", "F.linear(x.float(),"),
        ("integer sums are rounded", "_EXACT_COLUMNS = 1024", "_EXACT_COLUMNS = 4096"),
        ("nibbles of neighbours share a byte", "quads[:, :, :, 0] | quads[:, :, :, 1] << 4",
         "quads[:, :, :, 1] | quads[:, :, :, 0] << 4"),
        ("int8 is stored signed", "_interleave((q.view(torch.uint8) ^ 128))", "_interleave(q.view(torch.uint8))"),
        ("blocks of 16 rows one by one", "ROW_MULTIPLE, COLUMN_MULTIPLE = 2 * BLOCK_ROWS, 64",
         "ROW_MULTIPLE, COLUMN_MULTIPLE = BLOCK_ROWS, 64"),
    ),
    "model/linear.py": (
        ("rows of a packed embedding are their blocks' first", "torch.arange(len(ids)), ids % BLOCK_ROWS]",
         "torch.arange(len(ids)), 0 * ids]"),
        ("rows are stored a block late", "first = len(weight), first_row // BLOCK_ROWS\n", "first = len(weight), first_row // (2 * BLOCK_ROWS)\n"),
        ("scales of later pieces are the first's", "self.scale[first * BLOCK_ROWS:(first + count) * BLOCK_ROWS]",
         "self.scale[:count * BLOCK_ROWS]"),
        ("gradients of rounded steps", "if x.requires_grad and torch.is_grad_enabled():", "if False:"),
        ("parts of a joined matrix are not looked at", "not all(fits(rows, in_features) for rows in out_features)",
         "not fits(sum(out_features), in_features)"),
    ),
    "model/kernels/native.py": (
        ("scattered x is read as if it were not", "    x = x.contiguous()\n    y = torch.empty(rows", "    y = torch.empty(rows"),
        ("LLAMA_KERNELS is ignored", 'in ("torch", "triton"):', 'in ():'),
        ("a library is compiled where others read it", "built = Path(directory) / name", "built = target"),
        ("what cannot be loaded is a traceback", "except OSError as error:\n        return", "except KeyError as error:\n        return"),
        ("a cache that cannot be written is insisted on", "except (OSError, RuntimeError):", "except RuntimeError:"),
        ("int4 in the matrix unit at any number of rows", "fmt is INT4 and rows < INT4_TILE_ROWS", "False"),
    ),
    "model/kernels/linear.c": (
        ("a row reads the next row's sum", "128 * (int32_t)in->sum[row]", "128 * (int32_t)in->sum[row + 1]"),
        ("the matrix unit forgets int4's lower end", "low, x_scale[r], x_sum[r]);", "low, x_scale[r], 0);"),
        ("rows past the first eight are the first", "in->x + (first + r) * in->stride + g * GROUP;",
         "in->x + r * in->stride + g * GROUP;"),
    ),
    "model/kernels/pack.c": (
        ("packing takes the last range", "_mm512_cmp_ps_mask(error, best_error, _CMP_LT_OQ)", "0xffff"),
        ("packing rounds down", "_mm512_cvtps_epi32(scaled)", "_mm512_cvttps_epi32(scaled)"),
    ),
    "checkpoint/layout.py": (
        ("a joined matrix is stored as its parts could be",
         'parts = (config.q_size, config.kv_size) if place.module.endswith(".qkv") else place.shape[:1]',
         "parts = place.shape[:1]"),
        ("the ends are at 4 bits", '"int8" if place.module in ("embed", "head") else config.quantization', "config.quantization"),
        ("any dtype is as good", "if place.dtype != tensor.dtype and not (place.dtype is None and is_float):", "if False:"),
    ),
    "checkpoint/load.py": (
        ("blocks are read to where their rows would be", '[place.first_row // rows_each:]',
         "[place.first_row:]"),
        ("what is quantised is quantised otherwise", "if has is not None and wants not in (None, has):", "if False:"),
        ("fp8 on a CPU", 'if chosen == "fp8" and in_blocks(device):', "if False:"),
        ("packed weights in float16", 'if chosen is not None and dtype == "float16":', "if False:"),
    ),
    "checkpoint/save.py": (
        ("rows of blocks are saved for blocks", 'place.first_row // (BLOCK_ROWS if place.attribute == "blocks" else 1)',
         "place.first_row"),
    ),
    "commands/quantize.py": (
        ("what is there is overwritten", "if out.is_dir() and any(out.iterdir()):", "if False:"),
        ("a full disk is met at the end", "if free < num_bytes:", "if False:"),
        ("what is quantised is read once more", "if config.quantization is not None:", "if False:"),
        ("a checkpoint without its tokenizer", "        if (source / name).is_file():\n", "        if False:\n"),
    ),
    "commands/info.py": (
        ("the kernel for one row is that for all", "if row == 0 or kernel != chosen[row - 1]", "if row == 0"),
        ("torch is no kernel", '"torch" if native.library() is None else names[kernel]', "names[kernel]"),
    ),
}
FAULTS = tuple(Fault(file, *fault) for file, faults in _FAULTS.items() for fault in faults)
