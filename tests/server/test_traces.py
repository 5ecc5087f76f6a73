"""`x_trace` over HTTP, with the real engine on the demo model: what comes back is what `llm.trace` gives."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load

from llama import Add, SamplingParams
from llama.engine.request import TraceEvent
from llama.internals.lens import LENS_SITES, logit_lens
from llama.internals.trace import TracePlan
from llama.runtime import Llama
from server import traces
from server.errors import ApiError
from server.front import Front, Settings
from server.traces import TraceStore
from server.wire import EngineSpec
from tests.server.live import Served, wait_until

SUM = [{"role": "user", "content": "What is 17 + 25?"}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@contextmanager
def served_demo(**settings):
    """The demo behind a front."""
    front = Front(Settings(names=("demo",), spec=EngineSpec(options={"dtype": "float32"}), **settings))
    try:
        front.start()
        wait_until(lambda: front.supervisor.state == "ready")
        yield Served(front)
    finally:
        front.stop(0)


@pytest.fixture(scope="module")
def server():
    """With --enable-trace."""
    with served_demo(has_traces=True) as one:
        yield one


@pytest.fixture(scope="module")
def llm():
    """The same model here."""
    return Llama.load(dtype="float32", progress=False)


def post(server, path, **body):
    """Status and answer."""
    text = json.dumps(body)
    answer = server.ask(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                        f"Content-Length: {len(text.encode())}\r\n\r\n{text}".encode())
    return answer.status, json.loads(answer.body)


def chat(server, plan, **more):
    fields = {"messages": SUM, "temperature": 0, "max_tokens": 12, "x_trace": plan}
    return post(server, "/v1/chat/completions", **fields | more)


def test_small_captures_stand_in_the_reply(server, llm):
    sites = ["layers.2.attn.scores[head=1]", "final_norm.scale"]
    status, answer = chat(server, {"capture": sites, "positions": [-1, 3]})
    assert status == 200 and answer["choices"][0]["message"]["content"] == "17 + 25 = 42."
    expected = llm.trace(SUM, sites, [-1, 3], params=GREEDY)
    for name, site in answer["x_trace"]["sites"].items():
        values = np.array(site["values"], dtype=np.float32)  # null, which is no number, becomes NaN
        wanted = expected[name].numpy()
        assert site["shape"] == list(wanted.shape) and site["positions"] == [3, expected.num_prompt - 1]
        seen = np.isfinite(wanted)
        assert np.array_equal(seen, np.isfinite(values)) and np.abs(values - wanted)[seen].max() < 1e-3
    assert len(answer["x_trace"]["sites"]) == 2


def test_the_lens_comes_with_texts_and_is_what_the_layers_would_have_said(server, llm):
    begun = [*SUM, {"role": "assistant", "content": "17 + 25 ="}]
    status, answer = chat(server, {"capture": ["layers.*.lens[top=3]"], "positions": -1}, messages=begun, max_tokens=1,
                          add_generation_prompt=False, continue_final_message=True)
    ids = llm.template.encode(llm.tokenizer, begun, add_generation_prompt=False, continue_final_message=True)
    trace = llm.trace(ids, LENS_SITES, -1)
    table = logit_lens(llm.model, trace, 3)
    sites = answer["x_trace"]["sites"]
    assert status == 200 and len(sites) == llm.config.num_layers
    for layer in range(llm.config.num_layers):
        site = sites[f"layers.{layer}.lens[top=3]"]
        assert site["shape"] == [1, 3, 2]
        ids, logprobs = np.array(site["values"][0]).T
        assert ids.tolist() == table.ids[layer + 1, 0].tolist()
        assert np.abs(logprobs - table.logprobs[layer + 1, 0].numpy()).max() < 1e-3
        assert site["tokens"] == [[llm.tokenizer.token_bytes(int(one)).decode() for one in ids]]
    assert site["tokens"][0][0] == answer["choices"][0]["message"]["content"] == " "


def test_an_id_without_a_text_has_null(llm):
    served = SimpleNamespace(config=llm.config, tokenizer=llm.tokenizer, vocab_size=llm.config.vocab_size - 1,
                             max_context=99)
    params = SamplingParams(max_tokens=1)
    call = SimpleNamespace(trace=TracePlan(("logits[top=2]",)), prompts=[(1, 2)], params=params)
    event = TraceEvent("x", "logits[top=2]", (0, 1), np.array([[[65, 1], [66, 0]]] * 2, dtype=np.float32))
    event.values[1, 0, 0] = llm.config.vocab_size - 1
    site = traces.reply(call, served, [event], 1, TraceStore())["sites"]["logits[top=2]"]
    texts = [llm.tokenizer.token_bytes(one).decode() for one in (65, 66)]
    assert site["tokens"] == [texts, [None, texts[1]]]


def test_large_captures_are_fetched_by_id(server, llm):
    status, answer = post(server, "/v1/completions", prompt="Hello", temperature=0, max_tokens=9, ignore_eos=True,
                          x_trace={"capture": ["layers.*.mlp.act"]})
    trace = answer["x_trace"]
    assert status == 200 and "values" not in trace["sites"]["layers.0.mlp.act"]
    fetched = server.ask(f"GET /v1/traces/{trace['id']} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    assert fetched.status == 200 and len(fetched.body) == trace["bytes"]
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    expected = llm.trace("Hello", "layers.*.mlp.act", params=params)
    read = load(fetched.body)
    assert read.keys() == set(expected)
    assert all(np.abs(read[name] - expected[name].numpy()).max() < 1e-3 for name in read)
    gone = server.ask(b"GET /v1/traces/trace-0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    assert gone.status == 404 and b"there is no trace" in gone.body


def test_edits_change_the_reply_of_their_own_request_alone(server, llm):
    vector = [9.0, -9.0] * 128
    edit = {"edit": "add", "site": "layers.1.resid_post", "vector": vector, "positions": {"start": -1}}
    changed = llm.trace(SUM, edits=[Add("layers.1.resid_post", vector, positions=slice(-1, None))], params=GREEDY).text
    assert changed != "17 + 25 = 42."
    assert chat(server, {"edits": [edit]})[1]["choices"][0]["message"]["content"] == changed
    assert chat(server, None)[1]["choices"][0]["message"]["content"] == "17 + 25 = 42."
    assert "x_trace" not in chat(server, None)[1]


@pytest.mark.parametrize("plan, more, param, sentence", [
    ({"capture": ["layers.9.q"]}, {}, "x_trace.capture[0]", "x_trace: capture[0]: 'layers.9.q' matches no site"),
    ({"capture": "embed"}, {}, "x_trace.capture", "capture is a list"),
    ({"code": "import os"}, {}, "x_trace.code", "a plan has no such field"),
    ({"capture": ["embed"], "max_bytes": 2**40}, {}, "x_trace.max_bytes", "at most 16,777,216 bytes may be captured"),
    ({"capture": ["*"]}, {"ignore_eos": True, "max_tokens": 900}, "x_trace.capture[0]", "the captures take"),
    ({"edits": [{"edit": "zero", "site": "embed", "positions": 600}]}, {}, "x_trace.edits[0].positions",
     "never computed"),
    ({"capture": ["embed"]}, {"stream": True}, "stream", "a trace does not come with stream"),
    ({"capture": ["embed"]}, {"n": 2}, "n", "a trace is of one sample"),
    ([], {}, "x_trace", "must be an object")])
def test_a_plan_that_cannot_be_is_400_by_field(server, plan, more, param, sentence):
    status, answer = chat(server, plan, **more)
    assert status == 400 and answer["error"]["param"] == param and sentence in answer["error"]["message"]


def test_the_description_of_the_server_says_what_can_be_asked(server):
    document = json.loads(server.ask(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").body)
    fields = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert "x_trace" in fields and "/v1/traces/{id}" in document["paths"]


def test_what_never_came_is_400_after_the_run(server):
    status, answer = chat(server, {"edits": [{"edit": "zero", "site": "embed", "positions": [58, 59]}]}, stop=" ")
    assert status == 400 and answer["error"]["code"] == "trace_unfulfilled"
    assert "never fired" in answer["error"]["message"]


def test_without_the_flag_there_is_no_looking_inside():
    with served_demo() as one:
        status, answer = chat(one, {"capture": ["embed"]})
    assert status == 400 and answer["error"]["param"] == "x_trace" and "--enable-trace" in answer["error"]["message"]


def test_what_is_kept_has_bounds(monkeypatch):
    store = TraceStore()
    monkeypatch.setattr(traces, "KEPT_BYTES", 250)
    names = [store.keep(bytes([number]) * 100) for number in range(3)]
    with pytest.raises(ApiError, match="or not any more"):
        store.fetch(names[0])
    assert store.fetch(names[1])[0] == 1 and store.fetch(names[2])[0] == 2
    monkeypatch.setattr(traces, "MAX_KEPT", 1)
    names.append(store.keep(b"small"))
    with pytest.raises(ApiError):
        store.fetch(names[2])
    assert store.fetch(names[3]) == b"small"
