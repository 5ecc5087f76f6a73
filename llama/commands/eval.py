"""`llama eval`: perplexity of a text, agreement with a reference on it, accuracy on multiple-choice questions."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.checkpoint.pull import resolve
from llama.commands import CommandError, UsageError
from llama.commands.loading import load
from llama.commands.questions import read_questions
from llama.config import DTYPE_BYTES, LlamaConfig
from llama.evaluation import EvaluationError
from llama.evaluation.grading import Question, grade, standard_error
from llama.progress import ProgressBar

if TYPE_CHECKING:
    from llama.evaluation.choices import EncodedQuestion
    from llama.evaluation.text import Agreement, Reference, Window
    from llama.runtime import Llama

# What published perplexities of Llama are measured with.
_LENGTH = 2048
_PERCENTILES = (50, 90, 99, 99.9, 100)


def run(args: argparse.Namespace) -> int:
    """Measure what was asked for. Files are read first, so that a bad line costs no loading."""
    if args.text is None and args.choices is None:
        raise UsageError("nothing to measure; give --text, --choices or both")
    for name in ("length", "stride", "against"):
        if args.text is None and getattr(args, name) is not None:
            raise UsageError(f"--{name}: only a text is measured so; add --text")
    length = _window_length(args)
    if args.stride is not None and args.stride > length:
        raise UsageError(f"--stride: windows of {length} tokens that begin every {args.stride} leave tokens out; "
                         f"give 1 to {length}")
    text = None if args.text is None else _read_text(Path(args.text))
    questions = None if args.choices is None else read_questions(Path(args.choices))
    ids, reference = None, None
    if args.against is not None:
        ids, reference = _read_with_reference(args, text, length)
    llm = load(args)
    results: dict[str, Any] = {"model": args.model or "the demo model"}
    if text is not None:
        results["text"] = _measure_text(args, llm, text, length, ids, reference)
        _print_text(results["text"], args.json)
    reference = None  # before the questions: its head may be a gigabyte
    if questions is not None:
        results["choices"] = _measure_choices(llm, args.choices, questions)
        _print_choices(results["choices"], args.json)
    if args.json:
        print(json.dumps(results))
    return 0


def _window_length(args: argparse.Namespace) -> int:
    """The tokens of a window, of which the context must hold all."""
    longest = LlamaConfig.from_directory(resolve(args.model)).context_length(args.context)
    length = min(_LENGTH, longest) if args.length is None else args.length
    if not 2 <= length <= longest:
        raise UsageError(f"--length: windows of {length} tokens are not what this model can read; give 2 to {longest}")
    return length


def _read_text(path: Path) -> str:
    """A text as it stands, line ends included. Raises CommandError with the line that is no UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CommandError(f"{path}, line {line}: byte {content[error.start]:#04x} is no UTF-8; convert the "
                           "text") from None


# ---- texts ------------------------------------------------------------------------------------------


def _read_with_reference(args: argparse.Namespace, text: str, length: int) -> tuple[list[int], "Reference"]:
    """The text's ids, and what the reference makes of them: that model is gone before the other one comes."""
    from llama.evaluation.text import Reference

    changed = {"quantize": None, "kv_cache_dtype": None} | (
        {"dtype": args.against} if args.against in DTYPE_BYTES else {"dtype": None, "model": args.against})
    llm = load(argparse.Namespace(**vars(args) | changed))
    ids = llm.encode(text)
    texts = _windows(args, ids, length)
    with _bar("reading with the reference", sum(window.num_scored for window in texts)) as bar:
        return ids, Reference(llm, texts, bar.add)


def _windows(args: argparse.Namespace, ids: Sequence[int], length: int) -> list["Window"]:
    from llama.evaluation.text import windows

    try:
        return windows(ids, length, args.stride)
    except EvaluationError as error:
        raise CommandError(f"{args.text}: {error}") from None


def _measure_text(args: argparse.Namespace, llm: "Llama", text: str, length: int, reference_ids: list[int] | None,
                  reference: "Reference | None") -> dict[str, Any]:
    from llama.evaluation.text import score_text

    ids = llm.encode(text)
    if reference_ids not in (None, ids):
        raise CommandError(f"--against {args.against}: its tokenizer makes other tokens of {args.text}, so that there "
                           "is nothing to compare; give a checkpoint of the same family")
    texts = _windows(args, ids, length)
    with _bar("reading", sum(window.num_scored for window in texts)) as bar:
        score = score_text(llm, texts, reference, bar.add)
    result = {"file": args.text, "length": length, "stride": args.stride or length, "windows": len(texts),
              "tokens": len(ids), "scored_tokens": score.num_tokens, "nll": score.nll,
              "perplexity": score.perplexity}
    return result | ({} if score.agreement is None else {"against": _agreement(args.against, score.agreement)})


def _agreement(name: str, agreement: "Agreement") -> dict[str, Any]:
    return {"model": name, "perplexity": agreement.reference_perplexity, "kl_mean": agreement.mean,
            "kl_percentiles": {str(percent): agreement.percentile(percent) for percent in _PERCENTILES},
            "same_top": agreement.same_top}


def _print_text(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return
    print(f"{result['file']}: {result['scored_tokens']:,} of {result['tokens']:,} tokens scored, in "
          f"{result['windows']:,} windows of {result['length']} at a stride of {result['stride']}")
    print(f"perplexity        {result['perplexity']:.4f}")
    against = result.get("against")
    if against is not None:
        *middle, largest = against["kl_percentiles"].items()
        shares = ", ".join(f"{percent}% below {value:.2e}" for percent, value in middle)
        print(f"against {against['model']}\n  perplexity      {against['perplexity']:.4f}\n"
              f"  KL, in nats     {against['kl_mean']:.2e} on average; {shares}; at most {largest[1]:.2e}\n"
              f"  same top token  {against['same_top']:.2%}")


# ---- choices ----------------------------------------------------------------------------------------


def _measure_choices(llm: "Llama", name: str, lines: Sequence[tuple[int, Question]]) -> dict[str, Any]:
    from llama.evaluation.choices import log_likelihoods

    encoded = [_encode(llm, name, line, question) for line, question in lines]
    with _bar("answering", len(lines)) as bar:
        likelihoods = log_likelihoods(llm, encoded, bar.add)
    score = grade([question for _, question in lines], likelihoods)
    shares = {"accuracy": score.accuracy, "accuracy_by_length": score.accuracy_by_length}
    errors = {f"{kind}_stderr": standard_error(share, len(lines)) for kind, share in shares.items()}
    return {"file": name, **dataclasses.asdict(score), **shares, **errors,
            "log_likelihoods": [{"line": line, "sums": sums} for (line, _), sums in zip(lines, likelihoods)]}


def _encode(llm: "Llama", name: str, line: int, question: Question) -> "EncodedQuestion":
    from llama.evaluation.choices import encode

    try:
        return encode(llm, question)
    except EvaluationError as error:
        raise CommandError(f"{name}, line {line}: {error}") from None


def _print_choices(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        return
    print(f"{result['file']}: {result['num_questions']:,} questions")
    for title, kind in (("accuracy", "accuracy"), ("  by characters", "accuracy_by_length")):
        print(f"{title:16}  {result[kind]:.2%} ± {result[f'{kind}_stderr']:.2%}")


def _bar(what: str, total: int) -> ProgressBar:
    def describe(done: int, total: int, seconds: float) -> str:
        return f"{done:,}/{total:,}, {done / max(seconds, 1e-9):,.1f}/s"

    return ProgressBar(what, total, describe)
