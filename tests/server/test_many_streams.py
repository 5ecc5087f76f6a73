"""A thousand streams at once: every event once, in order, to the client that it is for."""

import asyncio
import json

from tests.server.clients import CHAT, COMPLETION, HELLO, PATIENCE, Received, outcome, texts
from tests.server.raw import post
from tests.server.scripted_http import pieces, scripted

NUM_STREAMS = 1000
NUM_CHATS = 500


def num_tokens(seed: int) -> int:
    return 8 + seed % 9


def request(seed: int) -> bytes:
    """One half are chats, the other completions of two samples."""
    fields = {"stream": True, "seed": seed, "max_tokens": num_tokens(seed)}
    if seed < NUM_CHATS:
        return post(CHAT, {"messages": HELLO, **fields}, "Connection: close")
    return post(COMPLETION, {"prompt": "x", "n": 2, **fields}, "Connection: close")


async def answers(port: int) -> list[bytes]:
    """What comes for each of them, all open at the same time, in this one thread."""
    async def answer(seed: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(seed))
        received = await reader.read(-1)
        writer.close()
        return received

    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*map(answer, range(NUM_STREAMS)))


def test_a_thousand_streams(record_property):
    # The engine begins when the last of them has come: so all are open together, and each step is for all.
    with scripted(max_running=NUM_STREAMS, gather=NUM_STREAMS) as server:
        before = server.memory("VmRSS")
        replies = [Received(received).answer() for received in asyncio.run(answers(server.port))]
        each = (server.memory("VmHWM") - before) / NUM_STREAMS
        assert "Traceback" not in server.log
    for seed, reply in enumerate(replies):
        assert outcome(reply) == "whole"
        for index in range(1 if seed < NUM_CHATS else 2):
            assert texts(reply, index) == pieces(seed, num_tokens(seed), index)
    assert len({json.loads(reply.events[0])["id"] for reply in replies}) == NUM_STREAMS
    record_property("bytes_per_stream", round(each))
    print(f"\n{NUM_STREAMS} streams at once: {each / 1024:.0f} KiB of the front's memory each")
