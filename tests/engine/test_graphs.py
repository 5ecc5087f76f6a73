"""llama.engine.graphs: steps that are replayed, on a device that does it as a GPU does (see recording.py)."""

import pytest
import torch

from llama.engine.device import Device
from llama.engine.engine import Engine
from llama.engine.graphs import BUCKETS
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from tests.engine.recording import NoWaiting, RecordingDevice, WaitError
from tests.engine.running import TINY, alone, engine_of, run
from tests.engine.simulation import request
from tests.model.pairs import hugging_face, ours, random_ids


@pytest.fixture(scope="module")
def model():
    """A tiny one, 4:1 heads."""
    return ours(hugging_face(TINY["8:2"]))


def requests_of(count, max_tokens=12):
    return [request(f"r{place}", random_ids(5 + place % 7, place), max_tokens=max_tokens, ignore_eos=True, logprobs=0)
            for place in range(count)]


@pytest.fixture
def forwards(model):
    """The numbers of tokens of each forward pass that Python made."""
    seen = []
    hook = model.blocks[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    yield seen
    hook.remove()


def test_a_decode_step_is_captured_once_and_then_replayed_without_the_models_python(model, forwards):
    engine = engine_of(model, Limits(512, max_running=8), 60, device=RecordingDevice())
    run(engine, requests_of(3, 20))
    assert forwards == [5 + 6 + 7, 4, 4]  # the prompts; once to warm up; once to capture
    run(engine, requests_of(4, 20))
    assert forwards == [18, 4, 4, 26] and engine._device.num_replays == 38


@pytest.mark.parametrize("max_running, count, rows", [
    (64, 1, 1), (64, 3, 4), (64, 9, 12), (7, 6, 7), (7, 7, 7), (20, 17, 20)])
def test_a_step_has_as_many_rows_as_the_next_graph_and_no_more_than_may_run(model, forwards, max_running, count, rows):
    engine = engine_of(model, Limits(512, max_running=max_running), 60, device=RecordingDevice())
    found = run(engine, requests_of(count))
    assert forwards[1:] == [rows, rows] and list(BUCKETS) == sorted(set(BUCKETS))
    assert found.ids == alone(model, requests_of(count)).ids


def test_guesses_for_which_no_graph_has_rows_are_computed_without(model, forwards):
    class Four:
        def propose(self, sequence, most):
            return (7,) * min(most, 4)

        def forget(self, sequence):
            pass

    requests = requests_of(3)
    for max_running, is_replayed in ((16, True), (14, False)):  # three times five rows
        engine = engine_of(model, Limits(512, max_running=max_running), 60, device=RecordingDevice(), proposer=Four())
        forwards.clear()
        found = run(engine, requests)
        assert (forwards.count(15) == 0) is is_replayed
        assert found.ids == alone(model, requests).ids


def test_a_prompt_and_what_decodes_beside_it_are_computed_without(model, forwards):
    engine = engine_of(model, Limits(512, step_tokens=8, mixed_step_tokens=8), 60, device=RecordingDevice())
    engine.submit(requests_of(1)[0])
    engine.step()
    engine.submit(request("long", random_ids(30), max_tokens=1))
    engine.step()
    replays = engine._device.num_replays
    engine.step()
    assert engine._device.num_replays == replays and forwards[-1] == 8


@pytest.mark.parametrize("kv_cache_dtype", [None, "int8", "fp8"])
def test_rows_that_fill_a_step_up_touch_nobodys_keys_and_values(model, kv_cache_dtype):
    """Blocks that nobody holds, the spare one too, hold rubbish; what they are given they do not hand on."""
    def engine(**chosen):
        made = Engine(model, Limits(512), 12, kv_cache_dtype=kv_cache_dtype, **chosen)
        for kept in (made.cache.keys, made.cache.values, made.cache.key_scales, made.cache.value_scales):
            if kept is not None and kept.dtype == torch.float32:
                kept.fill_(torch.nan)
        return made

    requests = requests_of(3, 30)
    recording, plain = engine(device=RecordingDevice()), engine()
    found, expected = run(recording, requests), run(plain, requests)
    assert found.ids == expected.ids
    spare = recording.cache.spare_slot
    written = (recording.cache.keys if kv_cache_dtype is None else recording.cache.key_scales)[0].float().flatten(1)
    is_written = ~written.isnan().any(dim=1)
    assert is_written[:spare].sum() == sum(len(one.prompt_ids) + 29 for one in requests) and is_written[spare:].sum() == 1


def test_more_steps_than_one_table_column_and_the_last_column_of_all(model):
    requests = [request("r", random_ids(30), max_tokens=98, ignore_eos=True, logprobs=0)]
    engine = engine_of(model, Limits(128), 8, device=RecordingDevice())
    assert run(engine, requests).ids == alone(model, requests).ids


# ---- the recording device itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [
    lambda x: x.tolist(), lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: x.numpy(), lambda x: x.cpu(),
    lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.__setitem__(x > 0, 0), lambda x: torch.tensor([1, 2]),
    lambda x: x[[0, 1]], lambda x: x.masked_select(x > 0)])
def test_what_would_wait_for_a_gpu_raises_in_a_capture(waits):
    x = torch.arange(3.0)
    with torch.inference_mode(), pytest.raises(WaitError):
        RecordingDevice().capture(lambda: (waits(x), x + 1))


def test_a_replay_computes_on_the_memory_of_the_capture_views_and_changes_in_place_too():
    calls = []
    x, kept = torch.ones(2, 3), torch.zeros(4)

    def run():
        calls.append(1)
        y = x * 2
        y[0].add_(1)  # in place, through a view
        kept.index_copy_(0, torch.arange(2), y[:, 0])
        return y.t().reshape(-1)

    with torch.inference_mode():
        replay, result = RecordingDevice().capture(run)
        assert result.isnan().all()  # nothing is computed by a capture
        x.fill_(5)
        replay()
    assert result.tolist() == [11, 10] * 3 and kept.tolist() == [11, 10, 0, 0] and len(calls) == 2


def test_a_copy_to_the_host_is_rubbish_until_it_is_waited_for_and_later_changes_do_not_reach_it():
    device = RecordingDevice()
    there = [torch.tensor([1, 2]), torch.tensor([[True]]), torch.tensor(3.0, dtype=torch.bfloat16), torch.empty(0, 4),
             torch.arange(6).view(2, 3).t()]
    wait = device.download(there)
    expected = [tensor.clone() for tensor in there]
    there[0].fill_(9)
    for found, right in zip(wait(), expected, strict=True):
        assert found.dtype == right.dtype and torch.equal(found, right)
    assert device.download([])() == [] and Device().download(there)() == there


def test_launching_may_not_read_what_the_device_has(model):
    with NoWaiting(), pytest.raises(WaitError, match="tolist waits for the device"):
        torch.ones(2).tolist()
