"""The page in a real browser, in front of the real server and the demo model."""

import re
import urllib.request

import pytest

from tests.needs import needs_browser
from tests.server.browser import ENTER, ESCAPE, RIGHT, SHIFT, TAB, Page
from tests.server.clients import KEY

pytestmark = needs_browser

GREETING = "Hello. How can I assist you today?"


@pytest.fixture(scope="module")
def chromium():
    page = Page()
    yield page
    page.close()


@pytest.fixture
def page(chromium, demo):
    """The page without history, ready, on a wide screen and in the light."""
    chromium.emulate(width=1000, height=800, scheme="light")
    chromium.open(demo.url)
    chromium.run("localStorage.clear(); sessionStorage.setItem('llama.key', arguments[0])", KEY)
    chromium.reload()
    chromium.complaints()
    chromium.until(lambda: chromium.is_seen("#state.ready") and chromium.is_seen(".welcome strong"), "ready")
    return chromium


def test_it_says_plainly_what_is_loaded(page):
    assert page.text("#root") == "demo"
    assert page.text("#state") == "ready · 2,048 tokens of context, served as llama3_1_8b_instruct"
    assert page.text(".welcome").startswith("demo")
    assert page.complaints() == []


def test_a_message_is_answered_and_measured(page):
    page.ask("Hello")
    assert page.text("article.user .text") == "Hello"
    assert page.reply() == GREETING
    assert re.match(r"\d+ tokens · [\d.]+ tokens/s · first after [\d,]+ ms$", page.text(".figures"))
    assert re.match(r"\d+ of 2,048 tokens used$", page.text("#used"))
    assert page.run("return document.querySelector('#draft').value") == ""


def test_the_conversation_is_what_the_model_is_sent(page):
    page.ask("Hello")
    page.ask("Thanks")
    page.click("#prompt summary")
    page.until(lambda: "Thanks" in page.text("#prompt-text"), "the prompt of both messages")
    prompt = page.text("#prompt-text")
    assert prompt.index("Hello") < prompt.index(GREETING) < prompt.index("Thanks")


def test_hovering_a_token_shows_its_probability_and_alternatives(page):
    page.ask("Hello")
    assert not page.is_seen("#card")
    page.hover(".reply .token:first-child")
    page.until(lambda: page.is_seen("#card"), "the card")
    assert page.text("#card .chosen .name") == "Hello"
    assert re.fullmatch(r"\d+\.\d%", page.text("#card .chosen .share"))
    assert len(page.texts("#card li")) == 5
    shares = [float(share.strip("<% ")) for share in page.texts("#card .share")]
    assert shares == sorted(shares, reverse=True)
    page.hover("#root")
    page.until(lambda: not page.is_seen("#card"), "the card is gone")


def test_the_prompt_stands_there_with_its_control_tokens(page):
    page.click("#prompt summary")
    page.type("#draft", "Good morning")
    page.until(lambda: "Good morning" in page.text("#prompt-text"), "the prompt")
    assert page.text("#prompt-text").startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n")
    assert page.text("#prompt-text").endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert page.texts("#prompt-text .special")[:2] == ["<|begin_of_text|>", "<|start_header_id|>"]
    assert re.fullmatch(r"Prompt of the next request, \d+ tokens", page.text("summary > span:first-child"))


def test_the_system_prompt_is_part_of_the_prompt(page):
    page.click("#settings-button")
    page.type("#system", "You are a llama.")
    page.click("#prompt summary")
    page.type("#draft", "Hello")
    page.until(lambda: "You are a llama.<|eot_id|>" in page.text("#prompt-text"), "the system prompt")
    assert page.text("article.system .text") == "You are a llama."


def test_a_reload_keeps_history_and_probabilities(page):
    page.ask("Hello")
    figures, used = page.text(".figures"), page.text("#used")
    page.reload()
    page.until(lambda: page.is_seen("article.reply"), "the history")
    assert page.text("article.user .text") == "Hello"
    assert page.reply() == GREETING
    assert page.text(".figures") == figures
    page.until(lambda: page.text("#used") == used, "how much of the context is used")
    page.hover(".reply .token:first-child")
    page.until(lambda: page.is_seen("#card"), "the card")
    assert page.text("#card .chosen .name") == "Hello"


def test_sampling_goes_by_the_controls(page):
    page.click("#settings-button")
    assert page.run("return document.querySelector('[name=temperature]').placeholder") == "0"  # the demo's own
    page.type("[name=max_tokens]", "2")
    page.ask("Hello")
    assert len(page.reply()) < len(GREETING) and GREETING.startswith(page.reply())
    assert page.text(".figures").endswith("cut off at the length limit")


def test_what_the_server_refuses_is_said(page):
    page.click("#settings-button")
    page.type("[name=temperature]", "7")
    page.ask("Hello")
    assert "temperature" in page.text("[role=alert]")
    page.run("document.querySelector('[name=temperature]').value = ''")
    page.click("article.reply .actions button:last-child")
    page.until(lambda: GREETING == page.reply(), "the reply, once it can be")
    assert page.texts("[role=alert]") == [""]


def test_markup_in_a_message_is_text(page):
    hostile = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    page.run("document.querySelector('[name=max_tokens]').value = 40")
    page.click("#prompt summary")
    page.ask(hostile)
    assert page.text("article.user .text") == hostile
    page.until(lambda: hostile in page.text("#prompt-text"), "the prompt")
    page.click("#chats-button")
    assert page.text("#chat-list li:first-child button:first-child") == hostile[:80]
    page.reload()
    assert page.text("article.user .text") == hostile
    assert page.run("return window.ran ?? null") is None
    assert page.run("return document.querySelectorAll('main img, main script, aside img').length") == 0


def test_everything_by_keyboard(page):
    assert page.run("return document.activeElement.id") == "draft"
    page.type("#draft", "Hello")
    page.press(SHIFT, ENTER)
    assert page.run("return document.querySelector('#draft').value") == "Hello\n"
    page.press(ENTER)
    page.until(lambda: page.texts("article.reply:not(.writing)"), "a reply")
    assert page.run("return document.activeElement.id") == "draft"
    page.press(SHIFT, TAB)  # from the message to the prompt, and on to the last reply
    assert page.run("return document.activeElement.tagName") == "SUMMARY"
    for _ in range(3):  # past its buttons
        page.press(SHIFT, TAB)
    focused = "return document.activeElement.textContent"
    assert page.run(focused) == "Hello"
    assert page.is_seen("#card")
    page.press(RIGHT)
    assert page.run(focused) == "."
    assert page.text("#card .chosen .name") == "."
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press(ESCAPE)
    assert not page.is_seen("#card")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_every_screen_by_day_and_night(page, scheme, width):
    page.emulate(width=width, height=740, scheme=scheme)
    page.run("document.querySelector('[name=max_tokens]').value = 40")
    page.click("#prompt summary")
    page.ask("Hello. My name is Ada-" + "x" * 300)
    assert page.too_wide() == []
    assert page.run("return document.querySelector('article.user .text').getBoundingClientRect().left") >= 6
    page.click("#settings-button")
    assert page.too_wide() == []
    page.hover("#root")  # away from the button, which still shows that its panel is open
    shade = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    assert page.run(shade, "#settings-button") != page.run(shade, "#chats-button")
    light = page.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 128")
    assert light == (scheme == "light")


def test_nothing_moves_when_a_token_is_looked_at(page):
    page.ask("Hello")
    places = """return [...document.querySelectorAll('.reply *')]
        .map((one) => JSON.stringify(one.getBoundingClientRect()))"""
    before = page.run(places)
    page.hover(".reply .token:nth-child(3)")
    page.until(lambda: page.is_seen("#card"), "the card")
    assert page.run(places) == before


def test_the_page_asks_nobody_else(demo):
    with urllib.request.urlopen(demo.url) as response:
        policy, page = response.headers["Content-Security-Policy"], response.read().decode()
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert not re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?(?:https?:)?//", page)
