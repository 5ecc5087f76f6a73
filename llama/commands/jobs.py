"""The files of a batch: prompts, and what is answered already. Both hold a JSON object a line.

Every result carries the prompt's line number, its id if it has one, and a digest of all that shapes the
answer: what has the same digest is answered, whenever that was.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from llama.commands import CommandError
from llama.engine.request import RequestError, SamplingParams

# So begins every line of an output, by which a torn one is told from the end of somebody else's file.
_BEGINNING = b'{"line": '

_PARAMS = {field.name: field.default for field in fields(SamplingParams)}
# JSON values that SamplingParams itself takes for granted.
_KINDS: Mapping[str, tuple[type, ...]] = {
    "stop": (str, list), "stop_token_ids": (list,), "logit_bias": (dict,), "ignore_eos": (bool,),
    "include_stop_str_in_output": (bool,), "skip_special_tokens": (bool,)}
_KIND_NAMES = {str: "a string", list: "a list", dict: "an object", bool: "true or false"}


@dataclass(frozen=True)
class Job:
    """One prompt of a batch: text, token ids or messages; the number of its line, from 1 up; its id or None.
    """

    line: int
    id: str | int | None
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    params: SamplingParams
    digest: str

    @property
    def key(self) -> tuple[str, str | int]:
        """What its results are found under: the id, or without one the line."""
        return ("line", self.line) if self.id is None else ("id", self.id)

    def record(self, result: Mapping[str, Any]) -> bytes:
        """The line of the output for its result."""
        name = {} if self.id is None else {"id": self.id}
        record = {"line": self.line, **name, "digest": self.digest, **result}
        # A lone surrogate in an id, which UTF-8 cannot write, becomes the escape by which JSON can.
        return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_jobs(path: Path, params: SamplingParams, model: str) -> list[Job]:
    """All prompts of a file; a line's own fields override `params`. `model` enters the digests.

    Raises CommandError with the number of the first bad line.
    """
    jobs: list[Job] = []
    lines: dict[tuple[str, str | int], int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            job = _read_job(number, line, params, model)
            if job.key in lines:
                raise CommandError(f"its id {job.id!r} is that of line {lines[job.key]} too; ids must differ")
        except (CommandError, RequestError) as error:
            raise CommandError(f"{path}, line {number}: {error}") from error
        lines[job.key] = number
        jobs.append(job)
    if not jobs:
        raise CommandError(f"{path} holds no prompts; give one JSON object a line")
    return jobs


def _read_job(number: int, line: bytes, params: SamplingParams, model: str) -> Job:
    raw = _parse(line)
    if raw is None:
        raise CommandError("this is no JSON object; a prompt looks like {\"prompt\": \"Once upon a time\"}")
    content = {name: raw.pop(name) for name in ("prompt", "messages") if name in raw}
    if len(content) != 1:
        raise CommandError("give either \"prompt\" or \"messages\"" + (", not both" if content else ""))
    prompt, messages = content.get("prompt"), content.get("messages")
    if "messages" in content and not isinstance(messages, list):
        raise CommandError(f"messages must be a list of messages, not {messages!r}")
    if "prompt" in content and not isinstance(prompt, str) and not _are_ids(prompt):
        raise CommandError(f"prompt must be a text or a list of token ids, not {prompt!r}")
    name = raw.pop("id", None)
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise CommandError(f"id must be a string or an integer, not {name!r}")
    params = replace(params, **_overrides(raw))
    return Job(number, name, prompt, messages, params, _digest(content, params, model))


def _overrides(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams that a line sets."""
    for name, value in raw.items():
        if name not in _PARAMS:
            raise CommandError(f"{name!r} is no field of a prompt; there are prompt, messages, id, "
                               f"{', '.join(_PARAMS)}")
        if name in _KINDS and not isinstance(value, _KINDS[name]):
            raise CommandError(f"{name} must be {' or '.join(_KIND_NAMES[kind] for kind in _KINDS[name])}, "
                               f"not {value!r}")
    if "logit_bias" in raw:  # JSON has no other names than strings
        raw["logit_bias"] = {int(name) if name.isdecimal() else name: bias
                             for name, bias in raw["logit_bias"].items()}
    return raw


def _digest(content: Mapping[str, Any], params: SamplingParams, model: str) -> str:
    # Without the defaults, so that a field that a later version adds changes no digest.
    chosen = {name: getattr(params, name) for name, default in _PARAMS.items()
              if getattr(params, name) != default}
    text = json.dumps([model, content, chosen], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_answered(path: Path) -> tuple[set[tuple[tuple[str, str | int], str]], int]:
    """What an output answers, as (key, digest), and the length in bytes of its whole lines.

    After them may stand one that an interruption tore. Raises CommandError on a line that is no result.
    """
    answered, length = set(), 0
    if not path.exists():
        return answered, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            whole = line.endswith(b"\n")
            raw = _parse(line) if whole else None
            torn = not whole and (line.startswith(_BEGINNING) or _BEGINNING.startswith(line))
            if not torn and not (raw and line.startswith(_BEGINNING) and isinstance(raw.get("digest"), str)):
                raise CommandError(f"{path}, line {number}: this is no result of `llama generate`; "
                                   "choose another --output")
            if raw:
                key = ("line", raw["line"]) if raw.get("id") is None else ("id", raw["id"])
                answered.add((key, raw["digest"]))
                length += len(line)
    return answered, length


def _parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None if there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
