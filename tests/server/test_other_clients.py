"""Clients that people have, other than the openai package, against the server on a socket."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from langchain_core.messages import convert_to_messages
from langchain_openai import ChatOpenAI

from llama import Llama, SamplingParams
from tests.needs import needs_curl, needs_lm_eval
from tests.server.clients import (CHAT, COMPLETION, HELLO, KEY, NAME, PROJECT_CHAT, ROOT, Server, serving)
from tests.server.test_documented import ANSWER, REQUEST, RESPONSE, STREAMED, filled


def run(*command: str, **options) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- curl ------------------------------------------------------------------------------------------------


@needs_curl
def test_the_line_that_the_server_prints(demo: Server):
    [line] = re.findall("^try: (curl .*)$", demo.printed, re.MULTILINE)
    reply = json.loads(run("bash", "-c", line.replace("KEY", KEY) + " --silent --fail"))
    assert reply["choices"][0]["message"]["content"] == ANSWER


@needs_curl
def test_curl_with_the_published_request(demo: Server):
    fields = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    url = f"{demo.url}{PROJECT_CHAT}&apikey=x"
    for version in ("--http1.1", "--http1.0", "--http2"):  # it asks to go on in HTTP/2, and is not heard
        command = ["curl", "--silent", "--fail", "--no-buffer", version, url, *fields, "-d"]
        filled(RESPONSE, run(*command, REQUEST.decode()).encode())
        streamed = run(*command, STREAMED.decode())
        assert streamed.endswith("data: [DONE]\n\n") and streamed.count("data: {") > 3
    sent_in_chunks = run(*command, REQUEST.decode(), "-H", "Transfer-Encoding: chunked")
    filled(RESPONSE, sent_in_chunks.encode())
    large = REQUEST.replace(b"{", b"{" + b" " * 100_000, 1)  # for such a one curl waits for 100 Continue
    filled(RESPONSE, run(*command, "@-", "-H", "Expect: 100-continue", input=large.decode()).encode())


@needs_curl
def test_curl_on_the_other_routes(demo: Server):
    for path in ("/health", "/ready", "/version", "/v1/models", "/openapi.json"):
        assert json.loads(run("curl", "--silent", "--fail", demo.url + path, "--oauth2-bearer", KEY))
        head = run("curl", "--silent", "--fail", "--head", demo.url + path, "--oauth2-bearer", KEY)
        assert head.startswith("HTTP/1.1 200 OK\n")
    refused = run("curl", "--silent", "--include", demo.url + CHAT, "--json", json.dumps({"messages": HELLO}))
    assert "401 Unauthorized" in refused and "WWW-Authenticate: Bearer" in refused


# ---- LangChain -------------------------------------------------------------------------------------------


@pytest.fixture
def chain(demo: Server) -> ChatOpenAI:
    return ChatOpenAI(model=NAME, base_url=f"{demo.url}/v1", api_key=KEY, temperature=0, max_retries=0,
                      stream_usage=True)


def test_langchain(chain):
    reply = chain.invoke("Hello")
    assert reply.content == ANSWER and reply.tool_calls == []
    assert reply.response_metadata["finish_reason"] == "stop"
    assert reply.usage_metadata["total_tokens"] > reply.usage_metadata["output_tokens"] > 5
    assert [each.content for each in chain.batch(["Hello"] * 3)] == [ANSWER] * 3
    assert chain.bind(stop=["assist yo"]).invoke("Hello").content == "Hello. How can I "


def test_langchain_streams(chain):
    chunks = list(chain.stream("Hello"))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    folded = sum(chunks[1:], chunks[0])
    assert folded.usage_metadata == chain.invoke("Hello").usage_metadata

    async def ask() -> str:
        return "".join([chunk.content async for chunk in chain.astream("Hello")])

    assert asyncio.run(ask()) == ANSWER


def test_langchain_with_a_conversation(chain):
    history = [("system", "Answer briefly."), ("user", "Hello"), ("assistant", ANSWER), ("user", "Hello")]
    reply = chain.invoke(history)
    assert reply.content
    assert reply.usage_metadata["input_tokens"] > chain.invoke("Hello").usage_metadata["input_tokens"] + 20
    [generations] = chain.generate([convert_to_messages(history)], n=2).generations
    assert [each.text for each in generations] == [reply.content] * 2


def test_langchain_with_log_probabilities(chain):
    content = chain.bind(logprobs=True, top_logprobs=2).invoke("Hello").response_metadata["logprobs"]["content"]
    assert "".join(each["token"] for each in content[:-1]) == ANSWER
    assert all(len(each["top_logprobs"]) == 2 for each in content)


def test_langchain_with_a_bad_request(chain):
    with pytest.raises(openai.BadRequestError, match="lower max_completion_tokens to at most"):
        chain.bind(max_tokens=10**6).invoke("Hello")


# ---- schemathesis ----------------------------------------------------------------------------------------


def test_schemathesis_finds_nothing(tmp_path: Path):
    """No 5xx, and no answer that /openapi.json does not have. Its requests are the same in every run.

    The one check that is left out says that what fits the schemas must be taken: no schema says which fields need
    one another.
    """
    with serving("--api-key", KEY, "--context", "96") as server:  # so that no answer is long
        options = ["--header", f"Authorization: Bearer {KEY}", "--checks", "all", "--warnings", "off",
                   "--no-color"]
        found = run(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *options,
                    "--exclude-checks", "positive_data_acceptance", "--max-examples", "12",
                    "--generation-deterministic", cwd=tmp_path)
        assert "No issues found" in found
        assert server.process.poll() is None and "Traceback" not in server.log


# ---- lm_eval ---------------------------------------------------------------------------------------------

TASKS = {
    "small_choices": {
        "target_delimiter": "", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}]},
    "small_answers": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n", "you"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}]},
}
QUESTIONS = [
    {"question": "Hello. How can", "choices": [" I assist you today?", " the moon"], "label": 0},
    {"question": "2 + 2 =", "choices": [" 9", " 4", " seven"], "label": 1},
    {"question": "Hello", "choices": [".", " potato"], "label": 0},
]


@needs_lm_eval
def test_lm_eval(demo: Server, tmp_path: Path):
    """Log likelihoods and generations as its local-completions asks for them, in batches and side by side."""
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, task in TASKS.items():
        source = {"task": name, "dataset_path": "json", "test_split": "test",
                  "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(source | task))  # JSON is YAML
    directory = ROOT / "llama" / "demo"
    model = f"model={NAME},base_url={demo.url}{COMPLETION},tokenizer={directory},num_concurrent=3,max_length=2048"
    run(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model,
        "--tasks", ",".join(TASKS), "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
        "--log_samples", "--batch_size", "2", env={**os.environ, "OPENAI_API_KEY": KEY, "HF_HOME": str(tmp_path)})
    samples = {name: sorted(map(json.loads, next((tmp_path / "out").rglob(f"samples_{name}_*")).open()),
                            key=lambda sample: sample["doc_id"]) for name in TASKS}
    llm = Llama.load()
    for question, sample in zip(QUESTIONS, samples["small_choices"], strict=True):
        prompt = llm.tokenizer.encode(question["question"], bos=False)
        for choice, [[score, _]] in zip(question["choices"], sample["resps"], strict=True):
            ids = llm.tokenizer.encode(question["question"] + choice, bos=False)
            assert ids[:len(prompt)] == prompt
            assert float(score) == pytest.approx(float(llm.score(ids)[len(prompt) - 1:].sum()), abs=0.1)
    for question, sample in zip(QUESTIONS, samples["small_answers"], strict=True):
        params = SamplingParams(temperature=0, max_tokens=12, stop=("\n", "you"))
        prompt = llm.tokenizer.encode(question["question"], bos=False)
        assert sample["resps"] == [[llm.generate(prompt, params).text]]
