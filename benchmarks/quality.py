"""What a weight format costs: perplexity and agreement with bfloat16, on the demo model and on random ones.

    python -m benchmarks.quality [--formats float32,int8,int4] [--cases 25] [--json]

Texts: the demo's held-out cases, whole conversations that it never saw; for the random models, of normally
distributed weights and of such with heavy tails and outlier channels, random ids. float32 stands beside the others
as the measure of what rounding to bfloat16 itself moves. Of random weights the distances say more than they would
for a trained model, which leaves its distributions certain; a bad rounding or scale shows as a multiple.
`llama eval --against bfloat16` measures the same on a checkpoint and a text of one's own.
"""

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

import llama
from benchmarks.common import begin, finish, show
from benchmarks.formats import FORMATS
from llama import Llama
from llama.evaluation.text import Reference, TextScore, Window, score_text
from tools.demo_format import CASES, case, render
from tools.make_checkpoint import make_checkpoint, make_config

DEMO = Path(llama.__file__).parent / "demo"
# The largest mean divergence from bfloat16, in nats, and the smallest share of the same likeliest token, on the demo.
BOUNDS = {"int8": (1e-3, 0.99)}
RANDOM_SHAPE = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
                "intermediate_size": 3584, "vocab_size": 8192}
RANDOM_TEXTS, RANDOM_LENGTH = 4, 256


def main() -> None:
    """Measure and print; exits with 1 if a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="float32,int8,int4", help="separated by commas (default %(default)s)")
    parser.add_argument("--cases", type=int, default=25, help="held-out cases of each skill (default %(default)s)")
    args, machine = begin(parser)
    results: dict[str, Any] = {"machine": machine, "models": {}}
    kept = True
    with tempfile.TemporaryDirectory() as folder:
        for model, directory, texts in subjects(Path(folder), args.cases):
            scores = measure(directory, texts, args.formats.split(","))
            results["models"][model] = {name: as_json(score) for name, score in scores.items()}
            tokens = next(iter(scores.values())).num_tokens
            show(f"{model}, {tokens:,} tokens: perplexity, and KL from bfloat16 in nats",
                 ["format", "perplexity", "bf16's", "mean KL", "median", "99%", "largest", "same top token"],
                 [[name, *list(as_json(score).values())[:-1], f"{score.agreement.same_top:.2%}"]
                  for name, score in scores.items()])
            kept = kept and (directory != DEMO or all(within(name, score) for name, score in scores.items()))
    finish(results, args.json)
    raise SystemExit(0 if kept else 1)


def subjects(folder: Path, num_cases: int) -> Iterator[tuple[str, Path, list[Window]]]:
    """Models, where they lie, and what they read."""
    yield "The demo model, held-out cases", DEMO, held_out(num_cases)
    for name, heavy in (("Random normal weights", False), ("Random weights with heavy tails", True)):
        directory = folder / name.replace(" ", "-")
        make_checkpoint(directory, make_config("tiny", RANDOM_SHAPE), seed=0, shard_bytes=10**9,
                        tokenizer=DEMO / "tokenizer.json", heavy_tails=heavy)
        rng = random.Random(0)
        yield name, directory, [Window(tuple(rng.randrange(RANDOM_SHAPE["vocab_size"]) for _ in range(RANDOM_LENGTH)))
                                for _ in range(RANDOM_TEXTS)]


def held_out(num_cases: int) -> list[Window]:
    """Conversations of every skill that the demo was made for, with material that training never had."""
    tokenizer, rng = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json")), random.Random(1)
    texts = ("".join(piece.text for piece in render(case(skill, rng))) for skill in CASES for _ in range(num_cases))
    return [Window(tuple(tokenizer.encode(text, add_special_tokens=False).ids)) for text in texts]


def measure(directory: Path, texts: Sequence[Window], names: Sequence[str]) -> dict[str, TextScore]:
    """Every format against bfloat16 on the same texts."""
    reference = Reference(Llama.load(directory, dtype="bfloat16", progress=False), texts)
    return {name: score_text(Llama.load(directory, progress=False, **FORMATS[name][0]), texts, reference)
            for name in names}


def as_json(score: TextScore) -> dict[str, float]:
    """The figures of a table's row."""
    agreement = score.agreement
    return {"perplexity": score.perplexity, "reference_perplexity": agreement.reference_perplexity,
            "kl_mean": agreement.mean, "kl_median": agreement.percentile(50), "kl_99": agreement.percentile(99),
            "kl_largest": agreement.percentile(100), "same_top": agreement.same_top}


def within(name: str, score: TextScore) -> bool:
    """Whether a format keeps its bounds, if it has any; says so."""
    if name not in BOUNDS:
        return True
    divergence, same = BOUNDS[name]
    kept = score.agreement.mean <= divergence and score.agreement.same_top >= same
    verdict = "kept" if kept else "NOT KEPT"
    print(f"\n{name}: mean KL at most {divergence:g}, same top token at least {same:.0%}: {verdict}")
    return kept


if __name__ == "__main__":
    main()
