"""`llama generate`: a text continued, to read or as JSON; or a file of prompts (`llama.commands.batch`)."""

import argparse
import json
import sys

from llama.commands import CommandError, UsageError, batch
from llama.commands.loading import load, sampling_params
from llama.commands.records import result_record
from llama.commands.reply import Reply
from llama.terminal import is_terminal, note, read_stdin, write_reply


def run(args: argparse.Namespace) -> int:
    """Continue the text, or what is piped in."""
    if args.input is not None or args.output is not None:
        return _run_batch(args)
    if args.logprobs is not None and not args.json:
        raise UsageError("--logprobs: log probabilities are printed as JSON only; add --json")
    params = sampling_params(args, n=args.n, logprobs=args.logprobs)
    prompt = _prompt(args.text)
    llm = load(args)
    ids = llm.encode(prompt)
    reply = Reply(len(ids), params)
    reply.receive(llm.stream(ids, params), shown=params.n == 1 and not args.json)
    if args.json:
        write_reply(json.dumps(result_record(llm.tokenizer, reply.completions()), ensure_ascii=False) + "\n")
    elif params.n > 1:
        for number, completion in enumerate(reply.completions(), start=1):
            note(f"[{number}]")
            write_reply(completion.text + "\n")
    if args.stats:
        reply.show_stats()
    return 0


def _run_batch(args: argparse.Namespace) -> int:
    if args.input is None or args.output is None:
        raise UsageError("--input and --output go together: prompts from the one, results to the other")
    if args.text is not None or args.json:
        extra = "--json" if args.text is None else "a text"
        raise UsageError(f"{extra} does not go with --input: each line of the file is a prompt, and each "
                         "result is JSON in any case")
    return batch.run(args, sampling_params(args, n=args.n, logprobs=args.logprobs))


def _prompt(text: str | None) -> str:
    """The text to continue, from the command line or stdin."""
    if text not in (None, "-"):
        return text
    if text is None and is_terminal(sys.stdin):
        raise UsageError("there is no text to continue: give one, or pipe one in")
    prompt = read_stdin()
    if not prompt:
        raise CommandError("there is no text to continue: stdin is empty")
    return prompt
