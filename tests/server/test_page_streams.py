"""The page in a real browser, in front of a server that says what a test wants it to."""

import json
import re

import pytest

from tests.needs import needs_browser
from tests.server.browser import ENTER, ESCAPE, SHIFT, Page
from tests.server.scripted_site import Site, chunk, event, token, whole

pytestmark = needs_browser

HOSTILE = "<img src=x onerror='window.ran = 1'><script>window.ran = 1</script>"
FOREVER = [chunk(), *(piece for number in range(2000) for piece in (chunk(f" {number}", [token(f" {number}")]), 0.01))]


@pytest.fixture(scope="module")
def chromium():
    page = Page()
    yield page
    page.close()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


@pytest.fixture
def page(chromium, site):
    """The page of a new site, whose port is an origin without history."""
    chromium.emulate(width=1400, height=800, scheme="light")
    chromium.open(site.url)
    return chromium


def pieces(stream, size):
    """The bytes of a stream, cut anew, with a pause after each so that they are read one by one."""
    data = b"".join(stream)
    for start in range(0, len(data), size):
        yield data[start:start + size]
        yield 0.002


def test_it_lives_under_its_own_strict_policy(page):
    page.until(lambda: page.is_seen("#state.ready"), "ready")
    page.ask("Hello")
    page.hover(".reply .token")
    page.until(lambda: page.is_seen("#card"), "the card")
    assert page.complaints() == []


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_stream_may_be_cut_anywhere(page, site, newline):
    stream = [chunk(), b": a heartbeat\n\n", *whole("Añ", "ŏ ", "🦙", "\r\n!")[1:]]
    site.stream = list(pieces([piece.replace(b"\n", newline) for piece in stream], 7))
    page.ask("Hello")
    assert page.reply() == "Añŏ 🦙\r\n!"
    assert page.text(".figures").startswith("5 tokens · ")


def test_a_character_of_several_tokens_is_shown_as_one(page, site):
    llama = "🦙".encode()
    parts = [token(llama[:1], -1.0, [(llama[:1], -1.0), ("x", -2.0)]), token(llama[1:3], -0.5), token(llama[3:], 0.0)]
    site.stream = [chunk(), chunk("A ", [token("A ")]), *(chunk("", [part]) for part in parts[:2]),
                   chunk("🦙", parts[2:]), chunk("!", [token("!")]), *whole()[1:]]
    page.ask("Hello")
    assert page.texts(".reply .token") == ["A ", "🦙", "!", "<|eot_id|>"]
    page.hover(".reply .token:nth-child(2)")
    page.until(lambda: page.is_seen("#card"), "the card")
    assert page.texts("#card .chosen .name") == [r"\xf0", r"\x9f\xa6", r"\x99"]
    page.reload()
    assert page.texts(".reply .token") == ["A ", "🦙", "!", "<|eot_id|>"]


def test_bytes_that_become_no_character_are_spelled_out(page, site):
    site.stream = [chunk(), chunk("", [token(b"\xf0\x9f")]), chunk("\ufffdA", [token("A")]),
                   chunk("", [token(b"\xe2")]), chunk("\ufffd", [token("<|eot_id|>")], "stop"), event("[DONE]")]
    page.ask("Hello")
    assert page.reply() == r"\xf0\x9fA\xe2"
    assert page.texts(".reply .held") == []


def test_a_token_says_how_likely_it_was_and_what_else_might_have_been(page, site):
    top = [("\n yes ", -0.1054), ("no", -2.3026), ("maybe", -20.0)]
    site.stream = [chunk(), chunk("no", [token("no", -2.3026, top)]), chunk(" so", [token(" so", -5.0, top)]),
                   *whole()[1:]]
    page.ask("Hello")
    page.hover(".reply .token")
    page.until(lambda: page.is_seen("#card"), "the card")
    assert page.texts("#card li") == ["↵ yes·90.0%", "no10.0%", "maybe< 0.1%"]
    assert page.texts("#card li.chosen .name") == ["no"]
    page.hover(".reply .token:nth-child(2)")  # one that was not among the likeliest
    page.until(lambda: page.texts("#card .chosen") == ["·so0.7%"], "the next card")
    assert len(page.texts("#card li")) == 4


def test_the_less_likely_the_deeper_the_tint_until_it_is_switched_off(page, site):
    words = [token("sure", 0.0), token(" even", -0.6931), token(" odd", -9.0)]
    site.stream = [chunk(), *(chunk(word["token"], [word]) for word in words), *whole()[1:]]
    page.ask("Hello")
    colors = """return [...document.querySelectorAll('.token')].slice(0, 3)
        .map((one) => getComputedStyle(one).backgroundColor)"""
    shades = [float(re.search(r"/ ([\d.]+)\)|, ([\d.]+)\)", each)[0].strip("/, )")) for each in page.run(colors)]
    assert shades[0] == 0 and shades[2] == pytest.approx(2 * shades[1], rel=0.02) and shades[2] > 0.3
    page.click("#settings-button")
    page.click("#tint")
    page.reload()
    assert len(set(page.run(colors))) == 1


def test_what_the_server_cuts_off_is_shown_apart(page, site):
    site.stream = [chunk(), chunk("One.", [token("One.")]), chunk("", [token(" EN")]), chunk("", [token("D")], "stop"),
                   event("[DONE]")]
    page.ask("Hello")
    assert page.texts(".reply .held") == [" EN", "D"]
    page.ask("Thanks")
    assert site.chats[-1]["messages"][1] == {"role": "assistant", "content": "One."}


def test_a_reply_is_stopped(page, site):
    site.stream = FOREVER
    page.type("#draft", "Count" + ENTER)
    page.until(lambda: len(page.texts(".reply .token")) > 5, "some tokens")
    assert page.text("#send") == "Stop"
    page.click("#send")
    page.until(lambda: page.text("#send") == "Send", "the end")
    assert page.text(".figures").endswith(" · stopped")
    assert page.reply().startswith(" 0 1 2 3")
    assert site.was_left.wait(10), "the server goes on writing"
    page.type("#draft", "Again" + ENTER)
    page.until(lambda: page.is_seen(".reply.writing .token"), "more tokens")
    page.press(ESCAPE)
    page.until(lambda: page.text("#send") == "Send", "the end, by Escape")


def test_a_draft_is_written_while_a_reply_comes(page, site):
    site.stream = FOREVER
    page.type("#draft", "Count" + ENTER)
    page.until(lambda: page.is_seen(".writing .token"), "tokens")
    page.type("#draft", "next" + ENTER)
    assert page.run("return document.querySelector('#draft').value") == "next"
    assert page.text("#send") == "Stop"
    page.click("#send")


@pytest.mark.parametrize(("ending", "said"), [
    ([event({"error": {"message": "the engine was lost " + HOSTILE}})], "the engine was lost " + HOSTILE),
    ([], ""), ([chunk("", [], "stop")], ""), ([b'data: {"choices"'], "")])
def test_a_broken_stream_never_looks_complete(page, site, ending, said):
    site.stream = [*whole("Half", " a")[:3], *ending]
    page.ask("Hello")
    assert page.reply() == "Half a"
    assert page.texts("[role=alert]") == [said]
    assert ("incomplete" in page.text(".figures")) == (not said)
    site.stream = whole("All")
    page.click(".reply .actions button:last-child")
    page.until(lambda: page.reply() == "All" and not page.texts(".writing"), "a reply that is whole")
    assert "incomplete" not in page.text(".figures")
    assert [each["role"] for each in site.chats[-1]["messages"]] == ["user"]


def test_leaving_in_the_middle_keeps_what_came(page, site):
    site.stream = FOREVER
    page.type("#draft", "Count" + ENTER)
    page.until(lambda: len(page.texts(".reply .token")) > 3, "some tokens")
    page.reload()
    assert page.reply().startswith(" 0 1 2")
    assert "incomplete" in page.text(".figures")


def test_nothing_that_comes_from_elsewhere_runs(page, site):
    site.root = HOSTILE
    site.stream = [chunk(), chunk(HOSTILE, [token(HOSTILE, -1.0, [(HOSTILE, -1.0)])]), *whole()[1:]]
    page.reload()
    page.until(lambda: page.text("#root") == HOSTILE, "the model's name")
    page.ask(HOSTILE)
    page.hover(".reply .token")
    page.until(lambda: page.is_seen("#card"), "the card")
    page.click("#prompt summary")
    page.click("#chats-button")
    site.refusal = (400, HOSTILE)
    page.ask("Hello")
    page.until(lambda: HOSTILE in page.text("#prompt-text"), "the prompt")
    assert page.reply() == "" and page.texts("[role=alert]")[-1] == HOSTILE
    assert page.run("return [window.ran ?? null, document.querySelectorAll('img, body script').length]") == [None, 1]


def test_text_that_looks_like_a_control_token_is_not_shown_as_one(page):
    page.click("#prompt summary")
    page.type("#draft", "<|eot_id|> 🦙 <|begin_of_text|>")
    page.press(SHIFT, ENTER)
    page.type("#draft", "möre")
    page.until(lambda: "möre" in page.text("#prompt-text"), "the prompt")
    assert page.text("#prompt-text") == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|eot_id|> 🦙 <|begin_of_text|>\nmöre<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert page.texts("#prompt-text .special") == [
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|start_header_id|>",
        "<|end_header_id|>"]
    assert "🦙" in page.texts("#prompt-text .piece")


def test_a_key_is_asked_for_and_sent(page, site):
    site.key = "a secret".replace(" ", "-")
    page.reload()
    page.until(lambda: page.is_seen("#key-dialog"), "the question for a key")
    assert page.text("#key-message") == "An API key is needed."
    page.type("#key", "wrong" + ENTER)
    page.until(lambda: page.is_seen("#key-dialog")
               and page.run("return document.querySelector('#key').value === ''"), "the question, again")
    page.type("#key", site.key + ENTER)
    page.until(lambda: page.text("#root") == "scripted", "the model's name")
    page.ask("Hello")
    assert page.reply() == "Hi there."
    assert site.key not in page.run("return JSON.stringify(localStorage)")
    page.reload()
    page.until(lambda: page.text("#root") == "scripted", "the model's name, without another question")


def test_a_question_for_a_key_may_be_declined(page, site):
    site.key = "secret"
    page.reload()
    page.until(lambda: page.is_seen("#key-dialog"), "the question for a key")
    page.click("#key-cancel")
    page.until(lambda: "an API key is needed" in page.text("#state"), "what is missing, and no other question")
    page.type("#draft", "Hello" + ENTER)
    page.until(lambda: page.is_seen("#key-dialog"), "the question, now that it is needed")
    page.type("#key", "secret" + ENTER)
    page.until(lambda: page.reply() == "Hi there.", "the reply")


def test_it_waits_for_a_model_that_loads(page, site):
    site.health = {"status": "loading", "detail": "the model is loading"}
    page.reload()
    page.until(lambda: page.text("#state") == "loading · the model is loading", "the state")
    assert page.run("return document.querySelector('#send').disabled")
    site.health = {"status": "ready", "detail": ""}
    page.until(lambda: page.is_seen("#state.ready"), "ready")
    page.ask("Hello")
    assert page.reply() == "Hi there."


def test_only_what_is_set_is_sent(page, site):
    page.ask("Hello")
    assert site.chats[-1] == {
        "model": "llama3_1_8b_instruct", "messages": [{"role": "user", "content": "Hello"}], "stream": True,
        "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 5}
    page.click("#settings-button")
    controls = {"temperature": 0.35, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 12, "seed": 7,
                "presence_penalty": -0.5, "frequency_penalty": 1, "repetition_penalty": 1.1}
    for name, value in controls.items():
        page.type(f"[name={name}]", str(value))
    page.type("#stop", r"END" "\n" r"\n\n" "\n" r"a\\n")
    page.reload()  # the controls are kept as well
    page.ask("Hello")
    sent = site.chats[-1]
    assert {name: sent[name] for name in controls} == controls
    assert sent["stop"] == ["END", "\n\n", r"a\n"]


def test_what_is_no_number_is_not_silently_left_out(page, site):
    page.click("#settings-button")
    page.type("[name=temperature]", "-")
    page.type("#draft", "Hello" + ENTER)
    assert page.run("return document.activeElement.name") == "temperature"
    assert site.chats == []


def test_a_message_is_changed_and_sent_anew(page, site):
    page.ask("Helo")
    page.ask("Thanks")
    page.click("article.user button")  # it is not seen, but there
    page.run("document.querySelector('.edit textarea').select()")
    page.type(".edit textarea", "\ue003Hello" + ENTER)
    page.until(lambda: page.texts("article.user .text") == ["Hello"], "the new message")
    page.until(lambda: not page.texts(".writing"), "its reply")
    assert site.chats[-1]["messages"] == [{"role": "user", "content": "Hello"}]
    page.click("article.user button")
    page.type(".edit textarea", " or not")
    page.press(ESCAPE)
    assert page.texts("article.user .text") == ["Hello"]


def test_chats_are_kept_apart(page, site):
    page.ask("First")
    page.click("#new-button")
    assert page.texts("article.user") == []
    assert page.text("#used") == ""
    page.ask("Second")
    assert [each["content"] for each in site.chats[-1]["messages"]] == ["Second"]
    page.click("#chats-button")
    assert page.texts("#chat-list li button:first-child") == ["Second", "First"]
    page.click("#chat-list li:last-child button:first-child")
    assert page.texts("article.user .text") == ["First"]
    page.click("#chat-list li:last-child button:last-child")
    assert page.texts("article.user") == []
    page.reload()
    assert page.texts("article.user .text") == ["Second"]


def test_a_full_store_costs_probabilities_and_no_words(page, site):
    site.stream = [chunk(), chunk("Hi there.", [token("Hi there.", -1.0, [("x" * 500, -1.0)] * 5)]), *whole()[1:]]
    page.ask("First")
    page.click("#new-button")
    page.run("""
        for (let size = 2 ** 23, filler = ""; size >= 1; size /= 2) {
          try { localStorage.setItem("filler", filler + "x".repeat(size)); filler += "x".repeat(size); } catch { }
        }""")
    site.stream = whole("Hi")
    page.ask("Second")
    page.reload()
    page.click("#chats-button")
    assert page.texts("#chat-list li button:first-child") == ["Second", "First"]
    page.click("#chat-list li:last-child button:first-child")
    assert page.text("article.reply .text") == "Hi there."
    assert page.texts("article.reply .token") == []


def test_a_reply_is_copied(page):
    page.devtools("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.ask("Hello")
    page.click(".reply .actions button")
    page.until(lambda: page.text(".reply .actions button:first-child") == "Copied", "the word")
    assert page.run("return navigator.clipboard.readText()") == "Hi there."


def test_a_reply_is_read_aloud_by_the_sentence(page, site):
    site.stream = whole("One", ".", " Two", " three", ".", " Four")
    page.ask("Hello")
    assert page.texts("#announcer p") == ["One.", " Two three.", " Four"]


def test_the_history_is_json_of_this_page_only(page):
    page.ask("Hello")
    page.run("localStorage.setItem('llama/some/prefix/chat.broken', '{'); localStorage.setItem('other', 'kept')")
    page.reload()
    assert page.texts("article.user .text") == ["Hello"]
    assert json.loads(page.run("return JSON.stringify(localStorage)"))["other"] == "kept"
