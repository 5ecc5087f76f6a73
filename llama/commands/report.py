"""What `llama info` found, in words."""

from typing import Any

_LABEL_WIDTH = 20


def size(num_bytes: int) -> str:
    """Bytes in the unit that suits them: 512 MiB, 14.96 GiB."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    digits = 0 if unit == "bytes" or value >= 100 else 2 if unit in ("GiB", "TiB") else 1
    return f"{value:.{digits}f} {unit}"


def as_text(facts: dict[str, Any]) -> str:
    """Everything but how loading went."""
    title = f"{facts['model']} ({facts['directory']})"
    return "\n".join([title, *_architecture(facts), "", *_weights(facts), "", *_memory(facts)])


def _architecture(facts: dict[str, Any]) -> list[str]:
    config = facts["architecture"]
    scaling = config["rope_scaling"]
    scaled = "no scaling" if scaling is None else (
        f"Llama 3.1 scaling by {scaling['factor']:g} from {scaling['original_max_position_embeddings']:,} "
        f"positions (frequency factors {scaling['low_freq_factor']:g} and {scaling['high_freq_factor']:g})")
    group = config["num_heads"] // config["num_kv_heads"]
    ends = ", ".join(map(str, config["eos_token_ids"])) or "none"
    begin = "none" if config["bos_token_id"] is None else config["bos_token_id"]
    return [
        _row("layers", f"{config['num_layers']}, {config['hidden_size']:,} wide"),
        _row("attention", f"{config['num_heads']} query heads of {config['head_dim']}, "
             f"{config['num_kv_heads']} key and value heads, each shared by {group}"),
        _row("feed-forward", f"SwiGLU, {config['intermediate_size']:,} wide"),
        _row("normalisation", f"RMSNorm, eps {config['rms_norm_eps']:g}"),
        _row("vocabulary", f"{config['vocab_size']:,} tokens, "
             + ("head tied to the embedding" if config["tie_word_embeddings"] else "head of its own")),
        _row("positions", f"{config['max_position_embeddings']:,} at most"),
        _row("rotary embedding", f"theta {config['rope_theta']:,.0f}, {scaled}"),
        _row("begin, end ids", f"{begin}; {ends}"),
        _row("parameters", f"{facts['parameters']:,}"),
    ]


def _weights(facts: dict[str, Any]) -> list[str]:
    stored = facts["stored"]
    on_disk = "not here as they should be" if stored is None else (
        f"{size(stored['bytes'])} of {', '.join(stored['dtypes'])} in {stored['files']} "
        + ("file" if stored["files"] == 1 else "files"))
    own = facts["architecture"]["quantization"] or facts["architecture"]["dtype"]
    return [_row("weights on disk", on_disk),
            *(_row(f"  in {name}", size(num_bytes) + (", the checkpoint's own" if name == own else ""))
              for name, num_bytes in facts["weight_bytes"].items())]


def _memory(facts: dict[str, Any]) -> list[str]:
    rows = [_row("KV cache", f"{facts['kv_bytes_per_token']:,} bytes a token in {facts['dtype']}"),
            "", f"{'context':>12} {'KV cache':>12} {'in all':>12}    with weights in {facts['weights']} and "
            f"{size(facts['overhead_bytes'])} for Python, torch and activations"]
    rows += [f"{row['tokens']:>12,} {size(row['kv_bytes']):>12} {size(row['needed_bytes']):>12}    "
             + ("fits" if row["fits"] else "does not fit") for row in facts["contexts"]]
    where = "here" if facts["device"] == "cpu" else f"on {facts['device']}"
    return [*rows, "", _row(f"free {where}", size(facts["free_bytes"])), _row("what fits", _what_fits(facts))]


def _what_fits(facts: dict[str, Any]) -> str:
    most, default = facts["max_context"], facts["default_context"]
    if not facts["fits"]:
        return "nothing: the weights alone need more"
    if default == most:
        return f"a context of {most:,} tokens"
    needed = size(most * facts["kv_bytes_per_token"])
    return f"a context of {default:,} tokens; of {most:,} with --kv-cache for its {needed}"


def kernels_as_text(kernels: dict[str, Any]) -> str:
    """What multiplies, one format a line."""
    why_not = kernels["why_not"]
    rows = ["", _row("compiled kernels", "AVX-512" + (" and AMX, the matrix unit" if kernels["matrix_unit"] else "")
                     if why_not is None else f"none: {why_not}")]
    for name, table in kernels["formats"].items():
        first, *later = (part["kernel"] for part in table)
        rows.append(_row(f"  {name}", first + "".join(f"; from {part['from_rows']} rows on, {kernel}"
                                                      for part, kernel in zip(table[1:], later))))
    if why_not is not None:
        rows.append(_row("", "without them, int8 and int4 take little memory, and much time"))
    return "\n".join(rows)


def loaded_as_text(loaded: dict[str, Any]) -> str:
    """How loading and generating went."""
    rows = ["", _row("loaded in", f"{loaded['seconds']:.2f} s"),
            _row("generated", f"{loaded['generated']} tokens, the first after "
                 f"{loaded['first_token_seconds']:.3f} s, then {loaded['tokens_per_second']:.1f} tokens/s"),
            _row("peak memory", f"{size(loaded['peak_bytes'])}, {size(loaded['before_bytes'])} of it before "
                 "loading")]
    if loaded["within_bound"] is not None:
        verdict = "within" if loaded["within_bound"] else "ABOVE"
        rows.append(_row("", f"{loaded['peak_ratio']:.3f} times the weights, {verdict} the bound of "
                         f"{loaded['bound']:g}"))
    return "\n".join(rows)


def _row(label: str, value: str) -> str:
    return f"{label:{_LABEL_WIDTH}}{value}"
