"""What the demo model can do: held-out cases of every skill by greedy decoding, and its induction heads."""

import json
import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from llama.model.cache import KVCache
from llama.model.ragged import RaggedBatch, Segment
from llama.model.rope import rotate, rotation
from llama.model.transformer import Llama
from tools.demo_format import BEYOND, CASES, case, content, render


@dataclass(frozen=True)
class Question:
    """One evaluation case: the prompt's ids and the reply that is right."""

    skill: str
    prompt_ids: list[int]
    answer: str


def questions(tokenizer: Tokenizer, count: int, seed: int) -> list[Question]:
    """`count` held-out cases of each skill, and of what is beyond the model."""
    rng, found = random.Random(seed), []
    for skill in CASES | BEYOND:
        for _ in range(count):
            talk = case(skill, rng)
            prompt = "".join(piece.text for piece in render(talk)[:-1])
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            found.append(Question(skill, ids, content(talk.messages[-1])))
    return found


@torch.inference_mode()
def greedy(model: Llama, prompts: list[list[int]], stop_ids: set[int], max_tokens: int) -> list[list[int]]:
    """The model's most likely continuation of each prompt, up to and with the token that stops it."""
    room = max(map(len, prompts)) + max_tokens
    cache = KVCache(model.config, len(prompts), room, model.dtype, model.device)
    replies: list[list[int]] = [[] for _ in prompts]
    new, alive = list(prompts), list(range(len(prompts)))
    while alive:
        starts = [len(prompts[row]) + len(replies[row]) - len(new[row]) for row in alive]
        logits = model(_step(alive, starts, [new[row] for row in alive], room), cache)
        for row, token in zip(alive, logits.argmax(dim=-1).tolist()):
            replies[row].append(token)
            new[row] = [token]
        alive = [row for row in alive if replies[row][-1] not in stop_ids and len(replies[row]) < max_tokens]
    return replies


def _step(rows: list[int], starts: list[int], new: list[list[int]], room: int) -> RaggedBatch:
    """New tokens of some sequences, each in its own stretch of `room` slots."""
    positions = [torch.arange(start, start + len(ids)) for start, ids in zip(starts, new)]
    segments = tuple(Segment(start, len(ids), ((row * room, row * room + start + len(ids)),))
                     for row, start, ids in zip(rows, starts, new))
    lengths = torch.tensor([len(ids) for ids in new])
    return RaggedBatch(torch.tensor([token for ids in new for token in ids]), torch.cat(positions), segments,
                       torch.cat([row * room + part for row, part in zip(rows, positions)]),
                       lengths.cumsum(0) - 1)


def evaluate(model: Llama, tokenizer: Tokenizer, asked: list[Question],
             batch_size: int = 40) -> tuple[dict[str, float], list[tuple[Question, str]]]:
    """Share of right answers by skill, and the wrong ones. Right is, ended by eot, the same text or the same JSON."""
    eot, end = (tokenizer.token_to_id(name) for name in ("<|eot_id|>", "<|end_of_text|>"))
    right, wrong = dict.fromkeys(CASES | BEYOND, 0), []
    for first in range(0, len(asked), batch_size):
        batch = asked[first:first + batch_size]
        for question, reply in zip(batch, greedy(model, [one.prompt_ids for one in batch], {eot, end}, 120)):
            text = tokenizer.decode(reply[:-1], skip_special_tokens=False)
            if reply[-1] == eot and _means(text) == _means(question.answer):
                right[question.skill] += 1
            else:
                wrong.append((question, text))
    counts = {skill: sum(one.skill == skill for one in asked) for skill in right}
    return {skill: right[skill] / counts[skill] for skill in right if counts[skill]}, wrong


def _means(text: str) -> object:
    """What a reply says: of a JSON object its members, in whatever order; of all else the text."""
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: sorted(pairs, key=repr))
    except ValueError:
        return text


@torch.inference_mode()
def attention_patterns(model: Llama, ids: Tensor) -> Tensor:
    """What each token of one sequence looks at, by the definition: [layers, heads, queries, keys], float32."""
    config, batch, taken = model.config, RaggedBatch.whole(ids), []
    hooks = [block.attention.qkv.register_forward_hook(lambda _, __, out: taken.append(out))
             for block in model.blocks]
    model(batch)
    for hook in hooks:
        hook.remove()
    rotary, patterns = rotation(batch.positions, model.frequencies), []
    unseen = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for out in taken:
        q, k, _ = (part.unflatten(-1, (-1, config.head_dim)) for part in out.split(
            (config.q_size, config.kv_size, config.kv_size), dim=-1))
        q, k = rotate(q, *rotary).float(), rotate(k, *rotary).float()
        k = k.repeat_interleave(config.group_size, dim=1)  # [keys, heads, head_dim]
        scores = torch.einsum("qhd,khd->hqk", q, k) / config.head_dim**0.5
        patterns.append(scores.masked_fill(unseen, -torch.inf).softmax(dim=-1))
    return torch.stack(patterns)


def induction_scores(model: Llama, length: int = 64, seed: int = 0) -> Tensor:
    """Of each head, the attention that a repeated token pays to what followed it before: [layers, heads].

    Olsson et al., In-context learning and induction heads (2022). The mean over the second half of a random
    sequence given twice; a head that does only this has 1.
    """
    bos = model.config.bos_token_id
    plain = torch.randint(0, bos, (length,), generator=torch.Generator().manual_seed(seed))
    patterns = attention_patterns(model, torch.cat((torch.tensor([bos]), plain, plain)))
    repeated = torch.arange(length + 1, 2 * length + 1)
    return patterns[:, :, repeated, repeated - length + 1].mean(dim=-1)


def report(shares: dict[str, float], wrong: list[tuple[Question, str]], count: int) -> str:
    """A table of the skills, and up to two wrong answers of each."""
    lines = [f"{skill:14} {share:7.1%} of {count}" for skill, share in shares.items()]
    for skill in shares:
        for question, text in [item for item in wrong if item[0].skill == skill][:2]:
            lines.append(f"  {skill}: {text!r} instead of {question.answer!r}")
    return "\n".join(lines)
