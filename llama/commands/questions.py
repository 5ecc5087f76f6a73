"""A file of multiple-choice questions: one JSON object a line."""

import json
from pathlib import Path
from typing import Any

from llama.commands import CommandError
from llama.evaluation.grading import Question

_NAMES = ("question", "context", "choices", "answer", "id")


def read_questions(path: Path) -> list[tuple[int, Question]]:
    """All questions of a file, each with the number of its line, from 1 up.

    A line has "choices" (two or more texts) and "answer" (one of them, or its place from 0), and either "context",
    which the choices follow as it stands, or "question", of which "Question: ...\\nAnswer:" is made. It may have an
    "id", which is not used. Raises CommandError with the number of the first bad line.
    """
    questions = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                questions.append((number, _read_question(line)))
            except CommandError as error:
                raise CommandError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise CommandError(f"{path} holds no questions; give one JSON object a line")
    return questions


def _read_question(line: bytes) -> Question:
    raw = _parse(line)
    unknown = next((name for name in raw if name not in _NAMES), None)
    if unknown is not None:
        raise CommandError(f"{unknown!r} is no field of a question; there are {', '.join(_NAMES)}")
    if ("question" in raw) == ("context" in raw):
        raise CommandError("give either \"question\" or \"context\"" + (", not both" if "context" in raw else ""))
    name = "question" if "question" in raw else "context"
    if not isinstance(raw[name], str):
        raise CommandError(f"{name} must be a text, not {raw[name]!r}")
    choices = raw.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise CommandError(f"choices must be a list of two or more texts, none empty, not {choices!r}")
    context = f"Question: {raw['question']}\nAnswer:" if name == "question" else raw["context"]
    return Question(context, tuple(choices), _place(raw.get("answer"), choices))


def _place(answer: Any, choices: list[str]) -> int:
    """The answer's place among the choices."""
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    raise CommandError(f"answer must be one of the choices, or its place from 0 to {len(choices) - 1}, not {answer!r}")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CommandError("this is no JSON object; a question looks like {\"question\": \"What is frozen water?\", "
                           "\"choices\": [\"ice\", \"steam\"], \"answer\": 0}")
    return value
