"""The model on a GPU: the numbers of the CPU, in every dtype and format, and a decode that never waits for the host."""

import shutil

import pytest
import torch

from llama.checkpoint.load import load_model
from llama.checkpoint.save import save_model
from llama.engine.engine import BLOCK_SIZE
from llama.model.cache import KVCache
from llama.model.ragged import PagedQueries, RaggedBatch, Segment, block_slots, slot_runs
from tests.gpu.loaded import QUESTIONS, conversation, demo, distance
from tools.train_demo import DEMO

# Those that a CPU has too. A GPU's error against float32 may be a little larger: it rounds in other places.
FORMATS = ("int8", "int4")


def test_float32_logits_are_those_of_the_cpu(device):
    ids = conversation(demo("cpu"), QUESTIONS[2])
    assert (demo(device).logits(ids).cpu() - demo("cpu").logits(ids)).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_no_further_off_than_on_the_cpu(device, dtype):
    for text in QUESTIONS:
        ids = conversation(demo("cpu"), text)
        exact = demo("cpu").logits(ids)
        assert distance(demo(device, dtype).logits(ids), exact) < 1.5 * distance(demo("cpu", dtype).logits(ids), exact)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_weight_format_is_no_further_off_than_its_definition_on_the_cpu(device, fmt):
    for text in QUESTIONS[:3]:
        ids = conversation(demo("cpu"), text)
        exact = demo("cpu").logits(ids)
        defined = distance(demo("cpu", "bfloat16", quantize=fmt).logits(ids), exact)
        assert distance(demo(device, "bfloat16", quantize=fmt).logits(ids), exact) < 1.25 * defined


def test_fp8_which_no_cpu_multiplies_is_no_further_off_than_int4(device):
    for text in QUESTIONS[:3]:
        ids = conversation(demo("cpu"), text)
        exact = demo("cpu").logits(ids)
        defined = distance(demo("cpu", "bfloat16", quantize="int4").logits(ids), exact)
        assert distance(demo(device, "bfloat16", quantize="fp8").logits(ids), exact) < defined


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_checkpoint_that_is_stored_quantised_is_the_same_as_one_that_is_rounded_on_the_way(device, fmt, tmp_path):
    save_model(load_model(DEMO, dtype="bfloat16", weights=fmt, progress=False), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    stored = load_model(tmp_path, dtype="bfloat16", device=device, progress=False)
    ids = conversation(demo("cpu"), QUESTIONS[1])
    batch = RaggedBatch.whole(torch.tensor(ids, device=device))
    with torch.inference_mode():
        assert distance(stored(batch), demo(device, "bfloat16", quantize=fmt).model(batch)) < 1e-6


class Decoding:
    """Sequences whose prompts are in a cache, and the step that comes next, as tensors of one shape at any length."""

    def __init__(self, model, lengths, device, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.model, self.device = model, device
        blocks = 1 + max(lengths) // BLOCK_SIZE + 1  # of each: room to go on
        self.cache = KVCache(model.config, len(lengths) * blocks, BLOCK_SIZE, model.dtype, device)
        self.cache.keys.fill_(torch.nan)
        self.cache.values.fill_(torch.nan)
        self.tables = torch.randperm(len(lengths) * blocks, generator=generator).view(len(lengths), blocks)
        self.ids = [torch.randint(0, 200, (length + 8,), generator=generator) for length in lengths]
        self.lengths = list(lengths)
        rows = torch.arange(len(lengths), dtype=torch.int32, device=device)
        self.batch = RaggedBatch(rows.long(), rows.long(), (), rows.long(), None,
                                 PagedQueries(rows, self.tables.int().to(device), rows.clone(), BLOCK_SIZE, 1))
        for place, ids in enumerate(self.ids):
            self._read(place, ids[:lengths[place]])
        self.aim()

    def _read(self, place, ids):
        table = self.tables[place].numpy()
        runs = slot_runs(table[:-(-len(ids) // BLOCK_SIZE)], len(ids), BLOCK_SIZE)
        slots = torch.from_numpy(block_slots(table, 0, len(ids), BLOCK_SIZE)).to(self.device)
        positions = torch.arange(len(ids), device=self.device)
        self.model(RaggedBatch(ids.to(self.device), positions, (Segment(0, len(ids), runs),), slots, positions[-1:]), self.cache)

    def aim(self, further=0):
        """Point the step at the tokens so many beyond the prompts."""
        ends = torch.tensor(self.lengths) + further
        slots = [block_slots(table.numpy(), end, end + 1, BLOCK_SIZE)[0] for table, end in zip(self.tables, ends.tolist())]
        self.batch.ids.copy_(torch.stack([ids[end] for ids, end in zip(self.ids, ends)]))
        self.batch.positions.copy_(ends)
        self.batch.slots.copy_(torch.tensor(slots))
        self.batch.paged.lengths.copy_(ends + 1)

    def expected(self, further=0):
        """Logits of the same tokens, each text whole and without a cache."""
        return torch.stack([self.model(RaggedBatch.whole(ids[:length + further + 1].to(self.device)))[-1]
                            for ids, length in zip(self.ids, self.lengths)])


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-3), ("bfloat16", 0.03)])
@torch.inference_mode()
def test_a_captured_decode_computes_whatever_its_tensors_are_pointed_at(device, dtype, bound):
    model = demo(device, dtype).model
    step = Decoding(model, [1, 15, 16, 17, 40], device)
    assert distance(model(step.batch, step.cache), step.expected()) < bound  # the first time: kernels are compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(step.batch, step.cache)
    for further in range(3):
        step.aim(further)
        logits.fill_(torch.nan)
        graph.replay()
        assert distance(logits, step.expected(further)) < bound


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int4"}, {"quantize": "fp8"}], ids=str)
@torch.inference_mode()
def test_a_decode_waits_for_nothing(device, options):
    model = demo(device, "bfloat16", **options).model
    step = Decoding(model, [5, 20], device)
    model(step.batch, step.cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(step.batch, step.cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
