"""`llama trace`: a run looked at: which sites there are, values to a file, pictures to a page."""

import argparse
import json
from pathlib import Path

from llama.commands import CommandError, UsageError
from llama.model.plan import TracePlan
from llama.model.positions import PlanError
from llama.model.sites import documentation
from llama.terminal import note


def run(args: argparse.Namespace) -> int:
    """Print the sites; or run the prompt and write what was asked for."""
    if args.sites:
        print(documentation())
        return 0
    if args.text is None:
        raise UsageError("there is nothing to trace: give a text, or --sites for what can be looked at")
    if args.html is None and args.out is None:
        raise UsageError("give --html for pictures, --out for values, or both")
    plan = _plan(args)
    if args.out is not None and not plan.capture:
        raise UsageError("--out: there is nothing to write; name sites with --capture, or give a --plan that does")
    from llama.commands.loading import load, sampling_params

    params = sampling_params(args, max_tokens=args.max_tokens or 1, temperature=0.0)
    llm = load(args)
    prompt = llm.encode_chat([{"role": "user", "content": args.text}]) if args.chat else llm.encode(args.text)
    if args.out is not None:
        _write_values(args, llm, llm.trace(prompt, plan.capture, plan.positions, plan.edits, params, plan.max_bytes))
    if args.html is not None:
        _write_page(args, llm, prompt, plan, params)
    return 0


def _plan(args: argparse.Namespace) -> TracePlan:
    """The plan of --plan, with what --capture adds. Raises CommandError, UsageError."""
    raw = {}
    if args.plan is not None:
        try:
            raw = json.loads(Path(args.plan).read_text("utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise CommandError(f"{args.plan}: this is no JSON: {error}") from error
    try:
        plan = TracePlan.from_json(raw)
        return TracePlan((*plan.capture, *args.capture), plan.positions, plan.edits, plan.max_bytes)
    except PlanError as error:
        raise CommandError(f"{args.plan or '--capture'}: {error}") from error


def _write_values(args: argparse.Namespace, llm, trace) -> None:
    from llama.internals.store import manifest, model_hash, save

    dtype = str(llm.model.dtype).removeprefix("torch.")
    save(trace, args.out, manifest(trace, str(args.model or "demo"), model_hash(llm.directory), dtype))
    note(f"{args.out}: {len(trace.values)} tensors of {len(trace.ids)} tokens")


def _write_page(args: argparse.Namespace, llm, prompt: list[int], plan: TracePlan, params) -> None:
    from llama.internals.report import gather, html, report_plan
    from llama.internals.store import atomically

    wanted = report_plan(llm.config, len(prompt))
    trace = llm.trace(prompt, wanted.capture, None, plan.edits, params, wanted.max_bytes)
    config, dtype = llm.config, str(llm.model.dtype).removeprefix("torch.")
    facts = {"model": str(args.model or "the demo model"), "dtype": dtype,
             "shape": f"{config.num_layers} layers of {config.num_heads} heads, {config.hidden_size:,} wide",
             "tokens": f"{trace.num_prompt} of prompt, {len(trace.ids) - trace.num_prompt} generated"}
    if plan.edits:
        facts["edits"] = json.dumps([{"edit": type(edit).__name__, "site": edit.site} for edit in plan.edits])
    text = html(gather(llm.model, trace, llm.token_text, facts))
    atomically(Path(args.html), lambda partial: partial.write_text(text, "utf-8"))
    note(f"{args.html}: {len(text.encode()) / 1e6:.1f} MB, one page that needs nothing else")
