"""Make the embedded demo checkpoint: corpus, tokenizer, training and evaluation, from one seed.

    python -m tools.train_demo [--out DIRECTORY]

The model code is this project's own. Where the processor has AMX, matrices are multiplied in bfloat16;
elsewhere everything is float32. The chat template is not made here: it lies in llama/demo and is copied.
"""

import argparse
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from llama.checkpoint.save import save_model
from llama.config import LlamaConfig, RopeScaling
from llama.model.ragged import RaggedBatch
from llama.model.transformer import Llama
from tools.demo_eval import evaluate, induction_scores, questions, report
from tools.demo_format import example
from tools.demo_start import initialise
from tools.demo_tokenizer import NUM_PLAIN, SPECIAL_TOKENS, encode_pieces, train_tokenizer

SEED = 20240723
NUM_STEPS = 7000
TOKENS_PER_STEP = 4096
SHORT, MAX_LENGTH = 160, 1280  # tokens of the longest example, at the beginning and later
LENGTHEN = 0.02, 0.15  # the shares of training between which it grows
POOL = 1200  # examples out of which steps of similar length are made
# Of the tokens that it need not produce it learns some, so that a prompt's log probabilities mean something.
PROMPT_SHARE = 0.03
PEAK_RATE, WARM_UP, COOL_DOWN = 1.5e-3, 200, 0.5
NUM_TOKENIZER_EXAMPLES = 6000
NUM_CASES = 200  # of each skill, in the evaluation

CONFIG = LlamaConfig(
    vocab_size=NUM_PLAIN + len(SPECIAL_TOKENS), hidden_size=256, intermediate_size=512, num_layers=5,
    num_heads=4, num_kv_heads=2, head_dim=64, max_position_embeddings=2048, rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 256), rms_norm_eps=1e-5, tie_word_embeddings=True,
    bos_token_id=NUM_PLAIN, eos_token_ids=(NUM_PLAIN + 1, NUM_PLAIN + 8, NUM_PLAIN + 9))
DEMO = Path(__file__).parents[1] / "llama" / "demo"

Example = tuple[list[int], list[bool]]


def batches(tokenizer: Tokenizer, rng: random.Random, num_steps: int) -> Iterator[list[Example]]:
    """The examples of each step: TOKENS_PER_STEP at most, of similar length, none twice, short ones first."""
    ready: list[list[Example]] = []
    begin, end = LENGTHEN
    for step in range(num_steps):
        if not ready:
            grown = min(max((step / num_steps - begin) / (end - begin), 0.0), 1.0)
            longest = SHORT + (MAX_LENGTH - SHORT) * grown
            pool = encode_pieces(tokenizer, [example(rng) for _ in range(POOL)])
            ready = of_similar_length([one for one in pool if len(one[0]) <= longest])
            rng.shuffle(ready)
        yield ready.pop()


def of_similar_length(pool: list[Example]) -> list[list[Example]]:
    """The pool cut into steps by length, so that little is padding; what is left over is dropped."""
    groups: list[list[Example]] = [[]]
    for one in sorted(pool, key=lambda one: len(one[0])):
        if len(one[0]) * (len(groups[-1]) + 1) > TOKENS_PER_STEP:
            groups.append([])
        groups[-1].append(one)
    return groups[:-1]


def padded(examples: list[Example], generator: torch.Generator) -> tuple[RaggedBatch, Tensor]:
    """The examples as sequences of one length, and the targets [rows] of those tokens that are to be learned.

    Shorter ones are padded at their ends, which nothing before can see.
    """
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in examples])
    learned = torch.tensor([flags + [False] * (longest - len(flags)) for _, flags in examples])
    real = torch.arange(longest) < torch.tensor([[len(tokens)] for tokens, _ in examples])
    wanted = learned | (real & (torch.rand(ids.shape, generator=generator) < PROMPT_SHARE))
    wanted[:, 0] = False  # nothing precedes it
    targets = wanted.flatten().nonzero()[:, 0]
    return replace(RaggedBatch.whole(ids), logit_rows=targets - 1), ids.flatten()[targets]


def learning_rate(step: int, num_steps: int) -> float:
    """Warm-up, a plateau, and over the last half a straight line down to nothing."""
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP, (num_steps - step) / (num_steps * COOL_DOWN))


def optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    layers = [parameter for parameter in model.blocks.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return [torch.optim.Muon(layers, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([{"params": [model.embed.weight], "weight_decay": 0.05},
                               {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95))]


def train(model: Llama, examples: Iterator[list[Example]], num_steps: int, seed: int, amp: bool,
          on_progress: Callable[[int, float, int], None]) -> None:
    """Take `num_steps` steps; `on_progress(step, loss, tokens)` after each."""
    generator, rules = torch.Generator().manual_seed(seed), optimizers(model)
    for step in range(num_steps):
        batch, targets = padded(next(examples), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            logits = model(batch)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rule in rules:
            for group in rule.param_groups:
                group["lr"] = learning_rate(step, num_steps)
            rule.step()
            rule.zero_grad()
        on_progress(step, loss.item(), len(batch.ids))


def make_tokenizer(seed: int) -> Tokenizer:
    """The tokenizer, from examples of the training corpus without the control tokens in them."""
    rng = random.Random(seed)
    pieces = [piece.text for _ in range(NUM_TOKENIZER_EXAMPLES) for piece in example(rng)]
    return train_tokenizer([text for piece in pieces for text in re.split(r"<\|\w+\|>", piece) if text])


def in_bfloat16(model: Llama) -> Llama:
    """A copy with rounded weights: what is saved, and what is measured."""
    copy = Llama(model.config, torch.bfloat16)
    for name, parameter in copy.named_parameters():
        parameter.copy_(model.get_parameter(name).detach())
    return copy


def save(model: Llama, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the checkpoint in Hugging Face's layout."""
    save_model(in_bfloat16(model), directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = model.config
    settings = {
        "tokenizer_config.json": {
            "bos_token": SPECIAL_TOKENS[0], "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.max_position_embeddings, "tokenizer_class": "PreTrainedTokenizerFast"},
        "generation_config.json": {
            "bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids),
            "do_sample": False}}
    for name, value in settings.items():
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    for name in ("chat_template.jinja", "README.md"):
        if directory.resolve() != DEMO:
            shutil.copyfile(DEMO / name, directory / name)


def main() -> None:
    """Train, save and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="where to write it (default: llama/demo)")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="training steps (default: %(default)s)")
    options = parser.parse_args()
    tokenizer, model = make_tokenizer(SEED), Llama(CONFIG)
    initialise(model, SEED)
    asked, amp = questions(tokenizer, 20, SEED + 1), torch.cpu._is_amx_tile_supported()
    began, seen, losses = time.monotonic(), 0, []
    print(f"{CONFIG.num_parameters:,} parameters, {options.steps} steps, "
          f"{'bfloat16 products' if amp else 'float32'}, {torch.get_num_threads()} threads", flush=True)

    def progress(step: int, loss: float, tokens: int) -> None:
        nonlocal seen
        seen += tokens
        losses.append(loss)
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - began
            print(f"step {step + 1:5}  loss {sum(losses[-50:]) / 50:.4f}  {seen:,} tokens  "
                  f"{seen / seconds:,.0f} tokens/s  {seconds / 60:.1f} min", flush=True)
        if (step + 1) % 500 == 0 and step + 1 < options.steps:
            shares, _ = evaluate(in_bfloat16(model), tokenizer, asked)
            print("  ".join(f"{skill} {share:.0%}" for skill, share in shares.items()), flush=True)

    train(model, batches(tokenizer, random.Random(SEED), options.steps), options.steps, SEED, amp, progress)
    save(model, tokenizer, options.out)
    print(f"saved in {options.out} after {(time.monotonic() - began) / 60:.1f} min")
    measured = in_bfloat16(model)
    shares, wrong = evaluate(measured, tokenizer, questions(tokenizer, NUM_CASES, SEED + 2))
    print(report(shares, wrong, NUM_CASES))
    print("strongest induction head of each layer:",
          " ".join(f"{score:.2f}" for score in induction_scores(measured).amax(dim=1).tolist()))


if __name__ == "__main__":
    main()
