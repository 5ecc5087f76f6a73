"""generation_config.json: how a checkpoint wants to be sampled, and where its turns end. Free of torch."""

from pathlib import Path

from llama.engine.request import RequestError, SamplingParams
from llama.strict_json import ConfigError, read_json_object, read_token_ids


def read_generation_config(directory: Path) -> tuple[SamplingParams, tuple[int, ...]]:
    """Sampling defaults and end-of-turn ids of generation_config.json; what it leaves open is as Llama 3.1's has it.

    Raises ConfigError that names the file.
    """
    path = Path(directory) / "generation_config.json"
    raw = read_json_object(path) if path.is_file() else {}
    raw = {name: value for name, value in raw.items() if value is not None}
    try:
        greedy = raw.get("do_sample") is False
        defaults = SamplingParams(
            temperature=0.0 if greedy else raw.get("temperature", 0.6),
            top_p=raw.get("top_p", 0.9),
            top_k=raw.get("top_k") or -1,
            repetition_penalty=raw.get("repetition_penalty", 1.0),
        )
        return defaults, read_token_ids(raw, "eos_token_id")
    except (ConfigError, RequestError) as error:
        raise ConfigError(f"{path}: {error}") from None
