"""The flags of `llama serve` and `python -m server`."""

import argparse
import re

from llama.flags import add_checkpoint_flags, add_engine_flags, count

ABOUT = ("Serve a model over HTTP, in the OpenAI API's JSON and server-sent events, with a page to try it at /. "
         "Ctrl-C or SIGTERM lets running answers end; a second one stops at once.")
NAME = "llama3_1_8b_instruct"
KEY_VARIABLE = "LLAMA_API_KEY"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all of them."""
    address = parser.add_argument_group("address")
    address.add_argument("--host", default="127.0.0.1", metavar="H",
                         help="address to bind (default: %(default)s); a public one needs an API key")
    address.add_argument("--port", type=_port, default=8000, metavar="P",
                         help="port (default: %(default)s); 0: any that is free")
    address.add_argument("--root-path", type=_root_path, default="", metavar="PATH",
                         help="serve everything under this prefix, as a gateway may want it")
    address.add_argument("--served-model-name", type=_name, action="append", metavar="NAME",
                         help=f"what clients call the model (default: {NAME}); may be given several times")
    _add_access(parser)
    _add_limits(parser)
    logs = parser.add_argument_group("log (on stderr)")
    logs.add_argument("--log-format", choices=("text", "json"), default="text", help="default: %(default)s")
    logs.add_argument("--access-log", action=argparse.BooleanOptionalAction, default=True,
                      help="a line for each answer, never with its content")
    add_checkpoint_flags(parser)
    add_engine_flags(parser)


def _add_access(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who may use it")
    group.add_argument("--api-key", action="append", metavar="KEY",
                       help=f"ask for this key; may be given several times. {KEY_VARIABLE} in the environment "
                       "keeps keys out of the list of processes: several with commas between them")
    group.add_argument("--api-key-file", metavar="FILE", help="keys, one a line")
    group.add_argument("--enable-trace", action="store_true",
                       help="let requests capture and change what happens inside, with x_trace")
    group.add_argument("--allow-anonymous", action="store_true",
                       help="bind a public address without a key all the same")
    group.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN",
                       help="let web pages of this origin, such as https://example.com, use the server; *: of any")
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                       help="answer to this name too, where a local address is bound")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument("--max-connections", type=count, default=1024, metavar="N",
                       help="open at once; beyond it: 503 (default: %(default)s)")
    group.add_argument("--max-running", type=count, metavar="N",
                       help="sequences computed together (default: 64)")
    group.add_argument("--max-queued", type=count, default=1024, metavar="N",
                       help="requests that may wait; beyond it: 429 (default: %(default)s)")
    group.add_argument("--max-queued-tokens", type=count, default=4_000_000, metavar="N",
                       help="tokens of prompts that may wait (default: %(default)s)")
    group.add_argument("--drain-seconds", type=_seconds, default=30.0, metavar="S",
                       help="what running answers get to end in when the server stops (default: %(default)g)")
    group.add_argument("--heartbeat-seconds", type=_interval, default=5.0, metavar="S",
                       help="a stream without text shows so often that it lives (default: %(default)g)")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _interval(text: str) -> float:
    seconds = _seconds(text)
    if seconds < 0.01:
        raise argparse.ArgumentTypeError(f"{text!r} is too short a time; give at least 0.01 seconds")
    return seconds


def _root_path(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._~/-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no prefix of paths; give one such as /gate/way")
    return "".join(f"/{part}" for part in text.split("/") if part)


def _name(text: str) -> str:
    """A model's name, which stands in JSON and in paths: there doubled slashes are one, and none ends them."""
    if not 1 <= len(text) <= 256 or not text.isprintable() or not all(text.split("/")):
        raise argparse.ArgumentTypeError(f"{text[:64]!r} is no name for a model; give 1 to 256 characters, and "
                                         "no slash but single ones within")
    return text
