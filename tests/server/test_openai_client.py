"""The openai package, sync and async, against a server on a socket."""

import asyncio
import os
import signal
from collections.abc import Iterator

import openai
import pytest

from tests.server.clients import CHAT, HELLO, KEY, NAME, Server, contents, wait_for_texts
from tests.server.raw import post
from tests.server.scripted_http import pieces, scripted
from tests.server.test_documented import ANSWER

PROMPT = "Hello. How can I"
CHATTING = {"model": NAME, "messages": HELLO, "temperature": 0}
CONTINUING = {"model": NAME, "prompt": PROMPT, "temperature": 0}


def client(server: Server, key: str = KEY, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, **{"max_retries": 0, **options})


@pytest.fixture(scope="module")
def api(demo: Server) -> Iterator[openai.OpenAI]:
    """The package's client of the demo's server."""
    with client(demo) as made:
        yield made


# ---- chats -----------------------------------------------------------------------------------------------


def test_a_chat(api):
    reply = api.chat.completions.create(**CHATTING)
    [choice] = reply.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", ANSWER)
    assert (choice.finish_reason, choice.logprobs, choice.message.tool_calls) == ("stop", None, [])
    assert reply.object == "chat.completion" and reply.model == NAME and reply.id.startswith("chat-")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 10


def test_a_streamed_chat(api):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with api.chat.completions.create(**CHATTING, **options) as stream:
        *chunks, last = list(stream)
    assert contents(chunks) == ANSWER
    rest = [None] * (len(chunks) - 1)
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", *rest]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*rest, "stop"]
    assert last.choices == [] and last.usage.completion_tokens == len(chunks) - 1
    assert {(chunk.id, chunk.created) for chunk in (*chunks, last)} == {(last.id, last.created)}


def test_the_package_adds_up_a_stream_to_the_same_answer(api):
    options = CHATTING | {"logprobs": True, "top_logprobs": 2, "n": 2}
    with api.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        folded = stream.get_final_completion()
    whole = api.chat.completions.create(**options)
    for one, other in zip(whole.choices, folded.choices, strict=True):
        assert one.message.content == other.message.content == ANSWER
        assert (one.index, one.finish_reason) == (other.index, other.finish_reason)
        assert len(one.logprobs.content) == len(other.logprobs.content)
        assert all(a.token == b.token for a, b in zip(one.logprobs.content, other.logprobs.content))
    assert folded.usage.to_dict() == whole.usage.to_dict()


def test_a_chat_over_the_documented_route(demo):
    made = openai.OpenAI(base_url=f"{demo.url}/project/p-12/genai/{NAME}/v1", api_key=KEY, max_retries=0,
                         default_query={"project_id": 12, "apikey": "x"})
    options = {"model": NAME, "messages": HELLO, "temperature": 0.5, "presence_penalty": 1}
    assert made.chat.completions.create(**options).choices[0].message.content == ANSWER
    assert contents(list(made.chat.completions.create(**options, stream=True))) == ANSWER


def test_the_async_client(demo):
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key=KEY, max_retries=0) as made:
            async def streamed() -> str:
                stream = await made.chat.completions.create(**CHATTING, stream=True)
                return contents([chunk async for chunk in stream])

            async def whole() -> str:
                return (await made.chat.completions.create(**CHATTING)).choices[0].message.content

            assert await asyncio.gather(*(ask() for ask in (streamed, whole) * 4)) == [ANSWER] * 8
            assert [model.id async for model in made.models.list()] == [NAME]

    asyncio.run(ask())


def test_several_choices(api):
    reply = api.chat.completions.create(**CHATTING, n=3)
    assert [(choice.index, choice.message.content) for choice in reply.choices] == \
        [(index, ANSWER) for index in range(3)]
    texts = ["", "", ""]
    for chunk in api.chat.completions.create(**CHATTING, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [ANSWER] * 3


def test_log_probabilities(api):
    options = CHATTING | {"logprobs": True, "top_logprobs": 3}
    content = api.chat.completions.create(**options).choices[0].logprobs.content
    assert bytes(byte for each in content[:-1] for byte in each.bytes).decode() == ANSWER
    for each in content:
        top = [one.logprob for one in each.top_logprobs]
        assert each.logprob == top[0] <= 0 and each.top_logprobs[0].token == each.token  # greedy
        assert len(top) == 3 and top == sorted(top, reverse=True)
    streamed = [chunk.choices[0].logprobs for chunk in api.chat.completions.create(**options, stream=True)]
    assert [one.token for each in streamed if each for one in each.content] == [one.token for one in content]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(api, stream):
    """One that begins in one token and ends in another."""
    reply = api.chat.completions.create(**CHATTING, stop=["assist yo"], stream=stream)
    text = contents(list(reply)) if stream else reply.choices[0].message.content
    assert text == "Hello. How can I "


def test_a_seed(api):
    def text(seed: int) -> str:
        options = CHATTING | {"temperature": 2, "top_p": 1, "seed": seed, "max_tokens": 24}
        reply = api.chat.completions.create(**options, extra_body={"top_k": -1, "ignore_eos": True})
        return reply.choices[0].message.content

    texts = [text(seed) for seed in range(4)]
    assert len(set(texts)) == 4  # at this temperature nearly every token may come
    assert [text(seed) for seed in range(4)] == texts


# ---- completions -----------------------------------------------------------------------------------------


def test_a_completion(api):
    reply = api.completions.create(**CONTINUING | {"prompt": [PROMPT, PROMPT], "max_tokens": 3, "n": 2})
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in reply.choices}) == 1
    assert {choice.finish_reason for choice in reply.choices} == {"length"}
    chunks = list(api.completions.create(**CONTINUING, max_tokens=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.choices[0].text


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_completion_that_scores_its_prompt(api, max_tokens):
    reply = api.completions.create(**CONTINUING, echo=True, logprobs=2, max_tokens=max_tokens)
    [choice] = reply.choices
    assert choice.text.startswith(PROMPT) and (choice.text == PROMPT) == (max_tokens == 0)
    scores = choice.logprobs
    first, *others = scores.token_logprobs
    assert first is None and all(score <= 0 for score in others)
    shown = len(scores.tokens) - max_tokens
    assert "".join(scores.tokens[1:shown]) == PROMPT  # the first one is the begin of text
    assert scores.text_offset[1:shown] == [len("".join(scores.tokens[1:at])) for at in range(1, shown)]
    for token, top in zip(scores.tokens[1:], scores.top_logprobs[1:], strict=True):
        assert token in top and 2 <= len(top) <= 3
    assert reply.usage.completion_tokens == max_tokens


def test_the_prompt_may_be_ids(api, demo):
    ids = demo.post("/tokenize", {"prompt": PROMPT}).json["tokens"]
    replies = [api.completions.create(**CONTINUING | {"prompt": prompt}, echo=True, max_tokens=2)
               for prompt in (PROMPT, ids, [ids])]
    first, *others = [reply.choices[0].text for reply in replies]
    assert first.startswith(PROMPT) and others == [first, first]


# ---- models ----------------------------------------------------------------------------------------------


def test_models(api):
    [model] = api.models.list()
    assert (model.id, model.object, model.owned_by) == (NAME, "model", "llama")
    assert api.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("another")


# ---- errors ----------------------------------------------------------------------------------------------


def test_a_bad_request(api):
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(**CHATTING | {"temperature": 3})
    error = caught.value
    assert (error.param, error.code, error.type) == ("temperature", "invalid_value", "invalid_request_error")
    assert "temperature must be a number from 0 to 2, not 3" in error.message
    assert error.response.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_the_context(api, stream):
    with pytest.raises(openai.BadRequestError, match="lower max_tokens to at most") as caught:
        api.chat.completions.create(**CHATTING, max_tokens=10**6, stream=stream)
    assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model(api):
    with pytest.raises(openai.NotFoundError) as caught:
        api.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_wrong_key(demo):
    stranger = client(demo, key="wrong")
    for ask in (stranger.models.list, lambda: stranger.chat.completions.create(**CHATTING)):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask()
        assert caught.value.code == "invalid_api_key"


def test_a_path_that_is_not_there(api):
    with pytest.raises(openai.NotFoundError):
        api.embeddings.create(model=NAME, input="x")


def test_a_full_queue_is_a_rate_limit_and_a_later_try_succeeds():
    with scripted("--max-running", "1", "--max-queued", "1", pace=0.005) as server:
        running, queued = (post(CHAT, {"messages": HELLO, "stream": True, "seed": seed}) for seed in (1, 2))
        others = [server.open(running)]
        wait_for_texts(others[0], 1)
        others.append(server.open(queued))
        server.wait_for(lambda: server.metric("num_requests_waiting") == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client(server).chat.completions.create(**CHATTING)
        assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("queue_full", "1")

        def leave(request) -> None:
            """The others go as soon as the client comes for the second time."""
            if request.headers["x-stainless-retry-count"] == "1":
                for stream in others:
                    stream.close()
                server.wait_for(lambda: server.metric("request_failure_total", 'reason="cancelled"') == 2)

        http = openai.DefaultHttpxClient(event_hooks={"request": [leave]})
        patient = client(server, max_retries=2, http_client=http).chat.completions
        reply = patient.with_raw_response.create(**CHATTING, seed=9, max_tokens=3)
        assert reply.retries_taken == 1
        assert reply.parse().choices[0].message.content == "".join(pieces(9, 3))


def test_an_error_in_the_midst_of_a_stream():
    with scripted(fault_of={"13": "raise@3"}) as server:
        stream = client(server).chat.completions.create(**CHATTING, seed=13, stream=True)
        chunks = []
        with pytest.raises(openai.APIError, match="the model failed on this request") as caught:
            chunks.extend(stream)  # keeps what came before
        assert contents(chunks) == "".join(pieces(13, 3))  # nothing of that is lost
        assert caught.value.code == "generation_failed"
        with pytest.raises(openai.InternalServerError):
            client(server).chat.completions.create(**CHATTING, seed=13)


def test_a_lost_engine_in_the_midst_of_a_stream():
    with scripted(pace=0.005) as server:
        stream = client(server).chat.completions.create(**CHATTING, seed=1, stream=True)
        chunks = [next(stream) for _ in range(5)]
        os.kill(server.engine_pid(), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="killed by SIGKILL") as caught:
            chunks.extend(stream)
        assert caught.value.code == "engine_lost"
        got = contents(chunks)
        assert len(got) >= 4 and got == "".join(pieces(1, len(got)))
