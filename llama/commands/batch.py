"""`llama generate --input --output`: a file of prompts at full batch, which can be stopped and resumed."""

import argparse
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llama.commands import CommandError
from llama.commands.jobs import Job, read_answered, read_jobs
from llama.commands.loading import load
from llama.commands.records import result_record
from llama.engine.request import Request, SamplingParams
from llama.progress import ProgressBar
from llama.terminal import note

if TYPE_CHECKING:
    from llama.runtime import Llama


def run(args: argparse.Namespace, params: SamplingParams) -> int:
    """Answer the prompts of the input that the output does not answer yet.

    Raises CommandError, which names the line, before anything is generated.
    """
    source, target = Path(args.input), Path(args.output)
    jobs = read_jobs(source, params, _identity(args))
    if target.exists() and target.samefile(source):
        raise CommandError(f"{target} is the input; choose another --output")
    answered, length = read_answered(target)
    pending = [job for job in jobs if (job.key, job.digest) not in answered]
    num_changed = len({key for key, _ in answered} & {job.key for job in pending})
    if num_changed:
        note(f"{target} answers {num_changed} of these prompts as they were before, or with other flags or "
             "another model; the new answers are appended")
    if pending:
        with target.open("ab") as file:
            file.truncate(length)
            _answer(load(args), source, pending, file, len(jobs), args.stats)
    note(f"{len(jobs)} prompts are answered in {target}")
    return 0


def _identity(args: argparse.Namespace) -> str:
    """What the answers depend on besides prompts and parameters, wherever the command is run from."""
    model = Path(args.model).resolve() if args.model and Path(args.model).is_dir() else args.model
    return f"{model} {args.dtype}"


def _answer(llm: "Llama", source: Path, jobs: Sequence[Job], file: BinaryIO, num_all: int,
            with_stats: bool) -> None:
    """Append the results of all `jobs` to `file`, each as it is finished."""
    _check(llm, source, jobs)
    num_done, num_tokens, began = num_all - len(jobs), 0, time.perf_counter()

    def describe(done: int, total: int, seconds: float) -> str:
        return f"{done}/{total} prompts, {num_tokens / max(seconds, 1e-9):,.0f} tokens/s"

    try:
        with (ProgressBar("answering", num_all, describe, num_done) as bar,
              closing(llm.complete((_encode(llm, job), job.params) for job in jobs)) as results):
            for place, completions in results:
                file.write(jobs[place].record(result_record(llm.tokenizer, completions)))
                file.flush()
                num_done += 1
                num_tokens += sum(len(completion.ids) for completion in completions)
                bar.add(1)
    except KeyboardInterrupt:
        note(f"{num_done} of {num_all} prompts are answered in {file.name}; the same command goes on from "
             "there")
        raise
    if with_stats:
        seconds = time.perf_counter() - began
        note(f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s")


def _check(llm: "Llama", source: Path, jobs: Iterable[Job]) -> None:
    """See that each prompt can be encoded and will be admitted. Raises CommandError with its line."""
    for job in jobs:
        try:
            ids, params = _encode(llm, job), job.params.with_defaults(llm.defaults)
            if params.grammar is not None:
                llm.grammars(params.grammar)
            llm.engine.submit(Request("check", tuple(ids), params))
            llm.engine.cancel("check")
        except ValueError as error:  # RequestError, ChatError, TokenizerError or GrammarError
            raise CommandError(f"{source}, line {job.line}: {error}") from error


def _encode(llm: "Llama", job: Job) -> list[int]:
    return llm.encode(job.prompt) if job.messages is None else llm.encode_chat(job.messages)
