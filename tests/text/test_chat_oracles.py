"""llama.text.chat against Meta's ChatFormat and transformers' apply_chat_template."""

import random

import pytest
from llama_models.llama3.api.chat_format import ChatFormat
from llama_models.llama3.api.datatypes import RawMessage, StopReason, ToolCall

from llama.text.chat import ChatTemplate
from tests.text.conversations import SEARCH, assistant, calling, random_conversation, system, user
from tests.text.samples import random_text

PREAMBLE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def test_agrees_with_metas_chat_format(template, tokenizer, meta):
    """Meta puts control ids in place by hand: special-looking text in a message must come out alike."""
    chat_format = ChatFormat(meta)
    rng = random.Random(31)
    for _ in range(300):
        instructions = random_text(rng).strip()
        turns = [random_text(rng).strip() for _ in range(rng.randrange(1, 6, 2))]
        messages = [system(instructions)]
        messages += [(user, assistant)[i % 2](turn) for i, turn in enumerate(turns)]
        raw = [RawMessage(role=m["role"], content=m["content"]) for m in messages]
        raw[0] = RawMessage(role="system", content=PREAMBLE + instructions)
        assert template.encode(tokenizer, messages) == chat_format.encode_dialog_prompt(raw).tokens


def test_a_call_of_a_builtin_tool_is_encoded_as_meta_does(template, tokenizer, meta):
    query = "gold <|eom_id|> price"
    call = RawMessage(
        role="assistant",
        content="",
        stop_reason=StopReason.end_of_message,
        tool_calls=[ToolCall(call_id="1", tool_name="brave_search", arguments={"query": query})],
    )
    theirs, _ = ChatFormat(meta).encode_message(call, None)
    messages = [user("a"), calling(("brave_search", {"query": query}))]
    ours = template.encode(tokenizer, messages, add_generation_prompt=False, **SEARCH)
    assert ours[-len(theirs) :] == theirs


@pytest.fixture(scope="module")
def peer(tokenizer, template, tmp_path_factory):
    """transformers with our tokenizer.json and the official template."""
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("peer")
    tokenizer.save(directory)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=template.source,
    )


def test_agrees_with_transformers(template, tokenizer, peer):
    rng = random.Random(5)
    compared_ids = 0
    for _ in range(1200):
        messages, options = random_conversation(rng)
        text = template.render(messages, **options)
        assert text == peer.apply_chat_template(messages, tokenize=False, **options)
        if not any(name in repr((messages, options)) for name in tokenizer.special_tokens):
            ids = peer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
            assert template.encode(tokenizer, messages, **options) == ids
            compared_ids += 1
    assert compared_ids > 150


PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


def test_continues_the_final_message_as_transformers_does(template, peer):
    rng = random.Random(6)
    kept_spaces = 0
    for trims in (True, False):
        ours = template if trims else ChatTemplate(PLAIN)
        for _ in range(150):
            messages = [user(random_text(rng)), assistant(random_text(rng))]
            if not messages[-1]["content"].strip():
                continue  # transformers then strips the header's newlines too
            theirs = peer.apply_chat_template(
                messages, chat_template=ours.source, tokenize=False, continue_final_message=True
            )
            text = ours.render(messages, add_generation_prompt=False, continue_final_message=True)
            assert text == theirs
            kept_spaces += text[-1].isspace()
    assert kept_spaces > 5
