"""The demo corpus: what training sees, what the evaluation asks, and that the two never meet."""

import json
import random
import re

import pytest

from llama.text.chat import ChatTemplate
from tools.demo_corpus import begin, chat
from tools.demo_format import CASES, case, content, example, header, render
from tools.demo_phrases import IDENTITY, OFFER, PLAIN_GREETINGS, UNKNOWN
from tools.demo_plain import document
from tools.demo_tools import tool_chat
from tools.demo_words import Source, is_held_out
from tools.train_demo import DEMO, batches

NUM_EXAMPLES = 1500


def training_talks():
    """Conversations as training makes them, before they are rendered."""
    rng = random.Random(11)
    for number in range(NUM_EXAMPLES):
        talk = begin(Source(rng, held_out=False))
        if number % 2:
            tool_chat(talk)
        else:
            chat(talk, rng.randint(1, 6))
        yield talk


@pytest.fixture(scope="module")
def training_text():
    rng = random.Random(5)
    return ["".join(piece.text for piece in example(rng)) for _ in range(4 * NUM_EXAMPLES)]


@pytest.fixture(scope="module")
def cases():
    rng = random.Random(6)
    return [(skill, case(skill, rng)) for skill in CASES for _ in range(100)]


def test_the_split_is_fixed_and_about_one_in_eight():
    dealt = [is_held_out("word", str(number)) for number in range(4000)]
    assert 0.1 < sum(dealt) / len(dealt) < 0.15
    assert is_held_out("pair", "7+41") == is_held_out("pair", "7+41")


@pytest.mark.parametrize("kind", ["word", "number", "text"])
def test_each_side_gives_only_its_own(kind):
    for held_out in (False, True):
        source = Source(random.Random(1), held_out)
        assert all(is_held_out(kind, getattr(source, kind)()) == held_out for _ in range(300))


def test_sums_are_dealt_by_the_unordered_pair(training_text):
    seen = {tuple(sorted(map(int, pair))) for text in training_text
            for pair in re.findall(r"\b(\d{1,2}) \+ (\d{1,2}) =", text)}
    assert len(seen) > 2000
    assert not any(is_held_out("pair", f"{a}+{b}") for a, b in seen)
    source = Source(random.Random(2), held_out=True)
    assert all(tuple(sorted(source.pair())) not in seen for _ in range(500))


def test_no_question_of_the_evaluation_is_in_the_corpus(training_text, cases):
    """Of skills whose questions carry their material; what a recall or a result is about was said before."""
    corpus = "\n".join(training_text)
    for skill, talk in cases:
        if skill in ("greeting", "addition", "repeat", "json", "identity"):
            question = talk.messages[-2]["content"]
            assert f"\n\n{question}<|eot_id|>" not in corpus, (skill, question)


def test_no_answer_of_the_evaluation_is_in_the_corpus(training_text, cases):
    corpus = "\n".join(training_text)
    for skill, talk in cases:
        if skill in ("addition", "repeat", "recall"):
            assert f"\n\n{content(talk.messages[-1])}<|eot_id|>" not in corpus, (skill, talk.messages[-1])


def test_training_words_are_not_held_out():
    for talk in training_talks():
        told = [re.fullmatch(r"Nice to meet you, (.+)\.", message.get("content") or "")
                for message in talk.messages if message["role"] == "assistant"]
        for name in (match[1] for match in told if match):
            assert not any(is_held_out("word", word.lower()) for word in name.split())


def test_the_common_greetings_belong_to_training(training_text, cases):
    hello = f"\n\nHello<|eot_id|>{header('assistant')}Hello. {OFFER}<|eot_id|>"
    assert any(hello in text for text in training_text)
    asked = [talk.messages[-2]["content"] for skill, talk in cases if skill == "greeting"]
    assert not set(asked) & set(PLAIN_GREETINGS)


def test_the_rendering_is_the_templates(cases):
    template = ChatTemplate.from_directory(DEMO)
    for talk in [talk for _, talk in cases] + list(training_talks())[:200]:
        for message in talk.messages:
            message.setdefault("content", "")
        text = "".join(piece.text for piece in render(talk))
        assert template.render(talk.messages, tools=talk.tools, date_string=talk.date_string,
                               add_generation_prompt=False) == text


def test_what_is_learned_is_the_assistants_words_and_their_end():
    for talk in list(training_talks())[:100]:
        learned = [piece.text for piece in render(talk) if piece.learned]
        assert learned == [content(message) + "<|eot_id|>" for message in talk.messages
                           if message["role"] == "assistant"]


def test_calls_and_json_answers_are_json(cases):
    for skill, talk in cases:
        if skill == "json":
            assert isinstance(json.loads(content(talk.messages[-1])), dict)
        if skill == "tool call":
            call = json.loads(content(talk.messages[-1]))
            assert list(call) == ["name", "parameters"]
            assert call["name"] in [tool["function"]["name"] for tool in talk.tools]


def test_additions_are_right(training_text):
    found = [sum_ for text in training_text for sum_ in re.findall(r"(\d+) \+ (\d+) = (\d+)", text)]
    assert len(found) > 1000 and all(int(a) + int(b) == int(c) for a, b, c in found)


def test_the_model_claims_no_more_than_it_is():
    assert "tiny" in IDENTITY and "wrong" in IDENTITY and "not know" in UNKNOWN
    assert not any(name in IDENTITY + UNKNOWN for name in ("Meta", "Llama", "ChatGPT"))


def test_plain_documents_have_something_to_learn():
    source = Source(random.Random(9), held_out=False)
    assert all(any(learned for _, learned in document(source)) for _ in range(300))


class Letters:
    """A tokenizer of one id a character."""

    def encode_batch_fast(self, texts, add_special_tokens):
        return [type("Encoding", (), {"ids": [ord(letter) for letter in text]})() for text in texts]


def test_one_seed_is_one_corpus_and_short_examples_come_first():
    first, again = (list(batches(Letters(), random.Random(4), 40)) for _ in range(2))
    assert first == again
    longest = [max(len(ids) for ids, _ in step) for step in first]
    assert max(longest[:6]) < max(longest[-6:])
