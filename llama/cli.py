"""The `llama` command: its flags, and what becomes of errors. Brings in torch only once a command needs it.

The reply goes to stdout, everything else to stderr. Exit codes: 0; 1 for an error; 2 for flags that cannot
be; 130 after Ctrl-C; 141 when whoever read stdout has gone.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from llama import __version__
from llama.commands import UsageError
from llama.config import DTYPE_BYTES, STORED_FORMATS
from llama.engine.request import MAX_LOGPROBS, MAX_SAMPLES, MAX_STOP_STRINGS
from llama.flags import add_checkpoint_flags, add_engine_flags, count
from llama.terminal import is_terminal, prepare_streams
from server import flags as server_flags


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"llama: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default those of the process; returns the exit code."""
    try:
        try:
            return _run(build_parser().parse_args(argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # At its end the interpreter tries to write what could not be written once more, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(args: argparse.Namespace) -> int:
    prepare_streams()
    try:
        return importlib.import_module(f"llama.commands.{args.command}").run(args)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        if is_terminal(sys.stderr):
            sys.stderr.write("\n")
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        sys.stderr.write(f"llama: error: {_explain(error)}\n")
        return 2 if isinstance(error, UsageError) else 1


def _explain(error: Exception) -> str:
    """An error as one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif type(error).__module__.partition(".")[0] != "llama":
        text = f"{type(error).__name__}: {text}; this should not happen, and --debug shows where it does"
    return " ".join(text.splitlines())


# ---- flags ------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = _Parser(prog="llama", description="Run Llama 3.1 checkpoints.",
                     epilog="llama COMMAND --help says more.")
    parser.add_argument("--version", action="version", version=f"llama {__version__}",
                        help="print the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_add_chat, _add_generate, _add_serve, _add_trace, _add_info, _add_eval, _add_quantize,
                _add_pull):
        add(commands).add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_chat(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "chat", help="talk with the model", description="Talk with the model: in turns, or with one "
        "question. What is piped in is the question, or follows it.")
    parser.add_argument("text", nargs="?", metavar="QUESTION", help="answer this and leave")
    parser.add_argument("--system", metavar="TEXT", help="system message to begin with")
    parser.add_argument("--tools", metavar="FILE.py", help="let the model call the functions of this file, which "
                        "is run; each call is shown, and you are asked first")
    parser.add_argument("--yes", action="store_true", help="run calls without asking")
    parser.add_argument("--stats", action="store_true",
                        help="after each reply, print tokens/s and time to first token")
    _add_sampling_flags(parser)
    add_checkpoint_flags(parser)
    add_engine_flags(parser)
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "generate", help="continue a text, or answer a file of prompts", description="Continue a text as it "
        "stands, without a chat template; or answer a file of prompts. Each line of that is a JSON object: "
        "\"prompt\" (a text or token ids) or \"messages\", perhaps \"id\", and perhaps fields of "
        "SamplingParams, which override the flags. Each result is a line too: the prompt's \"line\" and "
        "\"id\", \"text\", \"finish_reason\", \"usage\"; with n above 1, \"samples\". They come in the order "
        "in which they are finished.")
    parser.add_argument("text", nargs="?", metavar="TEXT",
                        help="what to continue; - or nothing: what is piped in")
    parser.add_argument("--input", metavar="FILE", help="prompts, one JSON object a line; needs --output")
    parser.add_argument("--output", metavar="FILE",
                        help="results, each appended when it is finished; what is answered there already is "
                        "skipped, so that the same command goes on where it was stopped")
    parser.add_argument("--n", type=count, metavar="N",
                        help=f"so many continuations of each text, at most {MAX_SAMPLES}")
    parser.add_argument("--json", action="store_true", help="print the result as a line of JSON")
    parser.add_argument("--logprobs", type=int, metavar="K",
                        help="in JSON, add each token's log probability and K likeliest alternatives, "
                        f"0 to {MAX_LOGPROBS}")
    parser.add_argument("--stats", action="store_true", help="print tokens/s and time to first token")
    _add_sampling_flags(parser)
    add_checkpoint_flags(parser)
    add_engine_flags(parser)
    return parser


def _add_info(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "info", help="show a checkpoint's architecture, the memory it needs and what fits here",
        description="Show a checkpoint's architecture, the memory it needs and what fits here; then load it, "
        "generate a few tokens, and show the time and the peak memory that this took.")
    parser.add_argument("--load", action=argparse.BooleanOptionalAction,
                        help="load it, or do not; by default it is loaded where it fits")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_checkpoint_flags(parser)
    return parser


def _add_eval(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "eval", help="measure how good a checkpoint is, or what quantising it has cost",
        description="Measure a checkpoint: the perplexity of a text, by the protocol behind the published "
        "figures for WikiText-2 (its test rows, joined by two line ends, in a file); its agreement with "
        "another format or checkpoint on the same text; and its accuracy on multiple-choice questions.")
    parser.add_argument("--text", metavar="FILE", help="the perplexity of this text, in UTF-8")
    parser.add_argument("--length", type=count, metavar="N",
                        help="tokens that are read together; by default 2048, or what the context holds")
    parser.add_argument("--stride", type=count, metavar="N",
                        help="tokens between the beginnings of such windows; by default the length. Less takes "
                        "longer and gives each token more context")
    parser.add_argument("--against", metavar="M",
                        help="on the text, also the agreement with this: the same checkpoint unquantised in "
                        f"{', '.join(DTYPE_BYTES)}, or another checkpoint")
    parser.add_argument("--choices", metavar="FILE",
                        help="accuracy on these questions, one JSON object a line: \"question\" (or \"context\", "
                        "which stands as it is), \"choices\" (texts), \"answer\" (one of them, or its place "
                        "from 0)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    add_checkpoint_flags(parser)
    parser.set_defaults(kv_cache=None, prompt_lookup=False, draft=None, deterministic=False)
    return parser


def _add_serve(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("serve", help="answer over HTTP, in the OpenAI API's JSON",
                                 description=server_flags.ABOUT)
    server_flags.add_flags(parser)
    return parser


def _add_trace(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "trace", help="look inside a run: values to a file, pictures to a page", description="Run a text and "
        "keep what passes the named places of the forward pass, or draw it. What follows is generated greedily, "
        "one token if --max-tokens does not say more.")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the prompt, as it stands")
    parser.add_argument("--sites", action="store_true", help="list the places that can be named, and leave")
    parser.add_argument("--capture", action="append", default=[], metavar="SITE", help="keep the values at this "
                        "place, such as 'layers.*.resid_post' or 'layers.3.attn.pattern[head=2]'; may be repeated")
    parser.add_argument("--plan", metavar="FILE", help="captures and edits, as JSON")
    parser.add_argument("--out", metavar="FILE", help="where the values go: .safetensors or .npz, with a manifest")
    parser.add_argument("--html", metavar="FILE", help="draw the run: one HTML file that needs nothing else")
    parser.add_argument("--chat", action="store_true", help="put the text to the model as a user's message")
    parser.add_argument("--max-tokens", type=count, metavar="N", help="new tokens at most; by default 1")
    add_checkpoint_flags(parser)
    add_engine_flags(parser)
    return parser


def _add_quantize(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "quantize", help="write a checkpoint with its weights rounded to 8 or 4 bits",
        description="Write a checkpoint with its weights rounded to 8 or 4 bits, which every command then takes as it "
        "takes the checkpoint itself. What --quantize would do at each start is done once.")
    parser.add_argument("model", metavar="MODEL", help="directory of a checkpoint, or hub id")
    parser.add_argument("out", metavar="OUT", help="directory to write: one that does not exist yet, or an empty one")
    parser.add_argument("--format", choices=STORED_FORMATS, required=True,
                        help="int8: hardly any loss; int4: less memory, more speed, some loss (llama eval measures it)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="dtype of what is not rounded, and of the KV cache; by default the checkpoint's own")
    return parser


def _add_pull(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    about = "download a checkpoint from the Hugging Face hub, unless it is here, and print its directory"
    parser = commands.add_parser("pull", help=about, description=f"{about.capitalize()}.")
    parser.add_argument("name", metavar="NAME", help="hub id, such as meta-llama/Llama-3.1-8B-Instruct")
    return parser


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling (by default as generation_config.json says)")
    group.add_argument("--max-tokens", type=int, metavar="N",
                       help="new tokens at most; by default what the context has left")
    heat = group.add_mutually_exclusive_group()
    heat.add_argument("--temperature", type=float, metavar="T",
                      help="0 to 2; 0 always takes the likeliest token")
    heat.add_argument("--greedy", dest="temperature", action="store_const", const=0.0,
                      help="the same as --temperature 0")
    group.add_argument("--top-p", type=float, metavar="P",
                       help="draw from the likeliest tokens that together reach P")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; -1 is all")
    group.add_argument("--min-p", type=float, metavar="P",
                       help="draw from tokens at least P times as likely as the likeliest")
    group.add_argument("--seed", type=int, metavar="S", help="make the draws repeatable")
    group.add_argument("--stop", action="append", metavar="TEXT",
                       help=f"end before this text; may be given up to {MAX_STOP_STRINGS} times")
    group.add_argument("--frequency-penalty", type=float, metavar="X",
                       help="-2 to 2; above 0: less of a token for each time it was generated")
    group.add_argument("--presence-penalty", type=float, metavar="X",
                       help="-2 to 2; above 0: less of a token that was generated")
    group.add_argument("--repetition-penalty", type=float, metavar="X",
                       help="above 0, at most 2; above 1: less of a token in prompt or reply")
