"""The page's lens in a real browser, in front of the real server and the demo model: by layer, how a token came."""

import re

import pytest

from tests.needs import needs_browser
from tests.server.browser import ENTER, ESCAPE, RIGHT, Page
from tests.server.clients import KEY, serving

pytestmark = needs_browser

SUM = "What is 17 + 25?"
ANSWER = "17 + 25 = 42."


@pytest.fixture(scope="module")
def chromium():
    page = Page()
    yield page
    page.close()


@pytest.fixture(scope="module")
def traced():
    """The server with the demo model, where requests may look inside."""
    with serving("--enable-trace") as server:
        yield server


@pytest.fixture
def page(chromium, traced):
    """The page without history, ready, with a sum that is answered."""
    show(chromium, traced)
    chromium.ask(SUM)
    assert chromium.reply() == ANSWER
    return chromium


def show(page, server, width=1100, height=800, scheme="light"):
    """A page without history."""
    page.emulate(width=width, height=height, scheme=scheme)
    page.open(server.url)
    page.run("localStorage.clear(); sessionStorage.setItem('llama.key', arguments[0])", KEY)
    page.reload()
    page.complaints()
    page.until(lambda: page.is_seen("#state.ready") and page.is_seen(".welcome strong"), "ready")


def token(number):
    """The selector of a token of the reply; from the end, if negative."""
    return f".reply .token:nth-{'' if number >= 0 else 'last-'}child({number + 1 if number >= 0 else -number})"


def rows(page):
    """By layer, the last one first, what it would have said: [[text, ...], ...], once it is there."""
    page.until(lambda: page.texts("#lens-rows tr"), "the lens")
    return page.run("""return [...document.querySelectorAll("#lens-rows tr")]
        .map((row) => [...row.querySelectorAll("td .name")].map((name) => name.textContent))""")


def test_a_click_on_a_token_shows_by_layer_what_was_about_to_be_said(page):
    tokens = page.texts(".reply .token")
    assert tokens[-4] == "4" and not page.is_seen("#lens")
    page.click(token(-4))
    assert page.is_seen("#lens")
    layers = rows(page)
    assert len(layers) == 5
    assert all(len(row) == 5 for row in layers) and layers[0][0] == "4"
    assert page.texts("#lens-rows th") == ["4", "3", "2", "1", "0"]
    assert page.text("#lens-title") == "How it came to 4"
    assert set(page.texts("#lens-rows .chosen strong")) == {"4"} == set(page.texts("#lens-rows strong"))
    assert page.text("#lens-rows tr:first-child .chosen .name") == "4"
    assert layers[-1][0] != "4"  # that it is there from the start would be no news
    # The last layer is what was drawn from: it says the same as the log probabilities of the reply itself.
    assert page.texts("#card .name") == layers[0]
    assert page.texts("#card .share") == page.texts("#lens-rows tr:first-child .share")
    assert page.complaints() == []


def test_every_token_of_a_reply_is_read_after_the_very_tokens_before_it(page):
    said = page.texts(".reply .token")
    assert " " in said and said[-1] == "<|eot_id|>"  # white space at its end, and nothing that is text at all
    for number, text in enumerate(said):
        page.click(token(number))
        assert rows(page)[0][0] == text.replace(" ", "·")
        assert re.fullmatch(r"The likeliest from layer \d on\.", page.text("#lens-state"))


def test_where_the_text_before_is_another_it_says_so(page):
    page.click("#settings-button")
    page.type("#system", "You are a llama.")
    page.click(token(0))
    rows(page)
    assert "It does not follow quite the same tokens" in page.text("#lens-state")
    assert not page.is_seen("#settings")


def test_the_lens_by_keyboard(page):
    page.run("document.querySelector('.reply .token').focus()")
    page.press(RIGHT)
    page.press(ENTER)
    assert rows(page)[0][0] == page.run("return document.activeElement.textContent").replace(" ", "·")
    assert page.run("return document.activeElement.matches('.lensed')")
    page.press(ESCAPE)
    assert not page.is_seen("#lens") and page.texts(".lensed") == []
    page.press(ENTER)
    rows(page)
    page.run("document.querySelector('#lens-close').focus()")
    page.press(ENTER)
    assert not page.is_seen("#lens")
    assert page.run("return document.activeElement.matches('.token')")


def test_it_closes_with_its_token_and_makes_room_for_the_settings(page):
    page.click(token(2))
    rows(page)
    page.click("#settings-button")
    assert page.is_seen("#settings") and not page.is_seen("#lens")
    page.click(token(2))
    rows(page)
    page.click("#new-button")
    assert not page.is_seen("#lens")


def test_what_the_server_refuses_is_said_in_it(page):
    page.run("model.id = 'another'")
    page.click(token(2))
    page.until(lambda: "'another' is not served here" in page.text("#lens-state"), "why not")
    assert page.texts("#lens-rows tr") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_it_fits_every_screen(chromium, traced, scheme, width):
    show(chromium, traced, width, 700, scheme)
    chromium.ask("Repeat: one two three")
    chromium.ask(SUM)
    chromium.click(".reply:last-child .token:nth-last-child(4)")
    assert rows(chromium)[0][0] == "4"
    assert chromium.too_wide() == []
    below, above, inside = chromium.run("""
        const [lens, token, foot] = ["#lens", ".lensed", "footer"]
          .map((one) => document.querySelector(one).getBoundingClientRect());
        const isBeside = lens.left >= token.right;
        return [isBeside || lens.top >= token.bottom, token.bottom <= foot.top, lens.bottom <= innerHeight]""")
    assert below and above and inside
    names = chromium.run("return document.querySelector('#lens-rows .name').getBoundingClientRect().width")
    assert names > 38  # room for a word


def test_without_the_flag_nothing_tells_of_it(chromium, demo):
    show(chromium, demo)
    chromium.ask("Hello")
    chromium.click(token(0))
    assert chromium.is_seen("#card") and not chromium.is_seen("#lens")
    chromium.press(ENTER)
    assert not chromium.is_seen("#lens")
    assert not chromium.is_seen("#card p:last-child")
