"""A server whose engine computes on a GPU, the terminal's command, and the benchmarks' smallest runs there."""

import json
import subprocess
import sys

import pytest

from tests.gpu.loaded import QUESTIONS, demo
from tests.server.clients import HELLO, ROOT, serving
from tests.server.raw import CHAT

ARITHMETIC = [{"role": "user", "content": QUESTIONS[1]}]


def test_a_server_answers_from_the_gpu(device):
    with serving("--device", device, "--context", "1024", "--kv-cache", str(64 << 20)) as server:
        for messages, expected in ((HELLO, "Hello. How can I assist you today?"), (ARITHMETIC, "17 + 25 = 42.")):
            answer = server.post(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 30})
            assert answer.status == 200
            assert json.loads(answer.body)["choices"][0]["message"]["content"] == expected


def test_the_command_answers_from_the_gpu(device):
    ran = subprocess.run([sys.executable, "-m", "llama", "chat", "--device", device, QUESTIONS[1], "--temperature", "0"],
                         cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout.strip()) == (0, "17 + 25 = 42."), ran.stderr


@pytest.mark.parametrize("command", [
    "decode --random 1b:2 --formats bf16,int8,int4,fp8 --prompt 100 --new 8 --turns 1",
    "prefill --random 1b:2 --formats bf16,fp8 --lengths 512 --turns 1",
    "offline --random 1b:2 --formats bf16,fp8 --running 4 --prompt 100 --new 8",
    "compare --random 1b:2 --groups bf16 --prompt 100 --new 8 --turns 1",
    "throughput --random 1b:2 --only deterministic --no-peers --repeats 1",
    "trace --random 1b:4 --tokens 2 --positions 2 --repeats 1",
    "kernels --shape 1b --formats bf16 --rows 1,16 --repeats 1"], ids=lambda command: command.split()[0])
def test_a_benchmark_runs_to_its_end(device, command):
    ran = subprocess.run([sys.executable, "-m", *f"benchmarks.{command} --device {device} --json".split()], cwd=ROOT,
                         capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "machine" in json.loads(ran.stdout.splitlines()[-1])


def test_the_greedy_text_of_a_whole_conversation_is_that_of_the_cpu(device):
    from llama import SamplingParams
    messages, said = [], {}
    for text in QUESTIONS[3:]:
        messages.append({"role": "user", "content": text})
        for where in (device, "cpu"):
            said[where] = demo(where).chat(messages, SamplingParams(temperature=0.0, max_tokens=24)).text
        assert said[device] == said["cpu"]
        messages.append({"role": "assistant", "content": said["cpu"]})
