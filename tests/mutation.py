"""Does the suite notice? Deliberate faults, one at a time, each of which some test must catch.

    python -m tests.mutation                all faults (minutes)
    python -m tests.mutation blocks salt    those whose file or description contains one of these words

Each fault is put into a copy of the project in a temporary folder, where the tests named for its file run
until the first failure. Prints what caught it; exits with 1 if a fault survived, or if the tests fail without any.
"""

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests import faults, trace_faults, weight_faults
from tests.faults import Fault

ROOT = Path(__file__).parent.parent
FAULTS = (*faults.FAULTS, *weight_faults.FAULTS, *trace_faults.FAULTS)

MOST_SECONDS = 300  # of the processor: a fault may well keep a test from ending

# What is run for a fault in a file, quickest first.
_BOOKS = ("engine/test_blocks.py", "engine/test_scheduler.py", "engine/test_lifecycle.py",
          "engine/test_interleaving.py")
_SAMPLER = ("engine/test_sampler.py", "engine/test_sampler_numbers.py", "engine/test_sampler_device.py")
_ENGINE = ("engine/test_constraint.py", "engine/test_engine_limits.py", "engine/test_engine.py")
_GRAMMAR = ("text/test_grammar.py", "text/test_certain.py", "text/test_json_schema.py")
_FORMATS = ("model/test_formats.py", "model/test_native.py")
_QUANTISED = ("checkpoint/test_quantised.py",)
_TRACES = ("internals/test_captures.py", "internals/test_edits.py", "internals/test_lens.py")
TESTS = {
    "model/formats.py": _FORMATS,
    "model/linear.py": (*_FORMATS, *_QUANTISED),
    "model/kernels/native.py": ("model/test_native.py",),
    "model/kernels/linear.c": ("model/test_native.py",),
    "model/kernels/pack.c": ("model/test_native.py",),
    "checkpoint/layout.py": _QUANTISED,
    "checkpoint/load.py": _QUANTISED,
    "checkpoint/save.py": _QUANTISED,
    "commands/quantize.py": ("commands/test_quantize.py",),
    "commands/info.py": ("commands/test_info.py",),
    "model/rope.py": ("model/test_rope.py",),
    "model/attention.py": ("model/test_attention.py",),
    "model/plan.py": _TRACES,
    "model/plan_tap.py": _TRACES,
    "model/edits.py": _TRACES,
    "model/selectors.py": _TRACES,
    "engine/tracing.py": _TRACES,
    "text/tokenizer.py": ("text/test_tokenizer.py",),
    "text/chat.py": ("text/test_chat_safety.py",),
    "text/stream.py": ("text/test_stream.py",),
    "generation_config.py": ("test_generation_config.py",),
    "driver.py": ("test_runtime.py",),
    "runtime.py": ("test_runtime.py",),
    "engine/blocks.py": _BOOKS,
    "engine/runs.py": ("engine/test_runs.py",),
    "engine/scheduler.py": (*_BOOKS, "engine/test_constraint.py"),
    "engine/limits.py": ("engine/test_limits.py", "engine/test_scheduler.py"),
    "engine/sequence.py": (*_BOOKS, *_ENGINE),
    "engine/propose.py": ("engine/test_propose.py",),
    "engine/draft.py": ("engine/test_draft.py",),
    "engine/sampler.py": (*_SAMPLER, "engine/test_constraint.py"),
    "engine/scores.py": _SAMPLER,
    "engine/upload.py": _SAMPLER,
    "engine/batch.py": ("engine/test_batch.py",),
    "engine/engine.py": _ENGINE,
    "completion.py": ("test_completion.py",),
    "text/matcher.py": _GRAMMAR,
    "text/grammar.py": _GRAMMAR,
    "text/schema.py": _GRAMMAR,
    "text/toolgrammar.py": ("text/test_certain.py",),
    "text/certain.py": ("text/test_certain.py",),
}


@dataclass(frozen=True)
class Verdict:
    """The tests that failed, and whether pytest itself ran to its end."""

    failed: tuple[str, ...]
    output: str
    is_sound: bool


def run_tests(tests: tuple[str, ...], file: str | None = None, source: str | None = None) -> Verdict:
    """Run these tests (paths under tests/) on a copy in which `file` (under llama/) has this source."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy = Path(folder)
        for name in ("llama", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if file is not None:
            (copy / "llama" / file).write_text(source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rf",
                   *(f"tests/{test}" for test in tests)]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        if file is not None and file.endswith(".c"):
            environment["XDG_CACHE_HOME"] = folder  # what is compiled of it is not kept
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False,
                              preexec_fn=_limit_time)
    if done.returncode == -signal.SIGXCPU:
        return Verdict(("a test that never ended",), "", True)
    failed = tuple(re.findall(r"^FAILED tests/(\S+)", done.stdout, re.MULTILINE))
    return Verdict(failed, done.stdout + done.stderr, done.returncode == (1 if failed else 0))


def _limit_time() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS + 10))


def mutated(fault: Fault) -> str:
    """The source of the fault's file with the fault in it. Raises ValueError if there is no place for it."""
    source = (ROOT / "llama" / fault.file).read_text()
    if source.count(fault.right) != 1:
        count = source.count(fault.right)
        raise ValueError(f"llama/{fault.file} has {count} times, not once: {fault.right!r}")
    return source.replace(fault.right, fault.wrong)


def main() -> int:
    """Run the chosen faults; returns the exit status."""
    parser = argparse.ArgumentParser(description="Deliberate faults, each of which the suite must notice.")
    parser.add_argument("words", nargs="*", help="only faults whose file or description has one of these")
    words = parser.parse_args().words
    chosen = [fault for fault in FAULTS
              if not words or any(word in f"{fault.file} {fault.what}" for word in words)]
    for tests in {TESTS[fault.file] for fault in chosen}:
        verdict = run_tests(tests)
        if verdict.failed or not verdict.is_sound:
            print(f"without any fault: {verdict.output}")
            return 1
    survived = 0
    for fault in chosen:
        verdict = run_tests(TESTS[fault.file], fault.file, mutated(fault))
        caught = bool(verdict.failed) and verdict.is_sound
        survived += not caught
        print(f"{fault.file:20} {fault.what:52} {verdict.failed[0] if caught else 'SURVIVED'}", flush=True)
        if not verdict.is_sound:
            print(verdict.output)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
