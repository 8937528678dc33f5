"""The page, in a browser: typing, streaming, stopping, alternatives, errors, keys."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lm.serving import page
from lm.tokenizers import CharTokenizer
from tests.support.served import served, written

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:\n"


def test_one_file_without_network() -> None:
    assert re.findall(r"""(?:src|href)=["'](?!data:)|@import|url\(|https?://""", page.TEXT) == []
    assert "'unsafe-inline'" not in page.POLICY and page.POLICY.count("sha256-") == 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    template = (
        "{% for one in messages %}{{ one['role'] + ': ' + one['content'] + '\n' }}{% endfor %}{{ 'assistant: ' }}"
    )
    written(folder / "letters.ckpt", CharTokenizer(LETTERS, end_of_text=True), chat=template, block=256)
    written(folder / "slow.ckpt", CharTokenizer(LETTERS, end_of_text=True), chat=template, block=256, width=512)
    (folder / "key").write_text("open-sesame\n")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("there is no browser")
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    found = context.new_page()
    found.errors = []
    found.on("console", lambda said: found.errors.append(said.text) if "Content Security" in said.text else None)
    found.on("pageerror", lambda error: found.errors.append(str(error)))
    found.set_default_timeout(30_000)
    yield found
    assert found.errors == []
    context.close()


def slide(tab: Any, name: str, value: float) -> None:
    tab.eval_on_selector(f"#{name}", f"e => {{ e.value = {value}; e.dispatchEvent(new Event('input')) }}")


@pytest.mark.browser
@pytest.mark.slow
def test_in_a_browser(tab: Any, place: Path) -> None:
    with served("--ckpt_path", "slow.ckpt", cwd=place) as (url, _):
        tab.goto(url)
        tab.wait_for_selector("#model option", state="attached")
        tab.fill("#prompt", "To be")
        slide(tab, "max_tokens", 40)
        tab.fill("#seed", "7")
        tab.keyboard.press("Control+Enter")
        tab.wait_for_selector("#more:not(:disabled)")
        tokens = tab.locator("#text .token")
        assert 0 < tokens.count() <= 40 and tab.inner_text("#text").startswith("To be")
        colours = {tokens.nth(i).evaluate("e => e.style.backgroundColor") for i in range(tokens.count())}
        assert len(colours) > 5
        assert "tokens/s" in tab.inner_text("#figures")
        # an alternative: the text goes on from it
        before = [tokens.nth(i).get_attribute("title") for i in range(4)]
        tokens.nth(4).click()
        other = tab.locator("#choices button:not(:disabled)").last
        name = other.locator("span").first.inner_text()
        other.click()
        tab.wait_for_selector("#more:not(:disabled)")
        titles = [tokens.nth(i).get_attribute("title") for i in range(5)]
        assert titles[:4] == before and titles[4].startswith(name)
        tab.locator("#complete .copy").click()
        tab.wait_for_selector("#complete .copy:text('Copied')")
        assert tab.evaluate("navigator.clipboard.readText()") == tab.evaluate("drawn()")
        # stopping
        slide(tab, "max_tokens", 1024)
        tab.click("#go")
        tab.wait_for_selector("#text .token")
        tab.keyboard.press("Escape")
        tab.wait_for_selector("#go:not(:disabled)")
        assert tokens.count() < 1024
        # an error is shown, and goes away
        tab.fill("#prompt", "§")
        tab.click("#go")
        tab.wait_for_selector("#error:not([hidden])")
        assert "lacks '§'" in tab.inner_text("#error")
        # chat, tokens, attention
        slide(tab, "max_tokens", 20)
        tab.click("#tab-chat")
        assert tab.is_hidden("#error")
        tab.fill("#message", "hello")
        tab.keyboard.press("Control+Enter")
        tab.wait_for_selector("#send:not(:disabled)")
        tab.wait_for_selector(".message .token")
        assert tab.locator(".message").count() == 2
        tab.click("#tab-tokens")
        tab.fill("#words", "abc")
        tab.wait_for_selector(".chip")
        assert tab.inner_text("#count") == "3 tokens, 3 characters" and tab.locator(".chip").count() == 3
        tab.click("#tab-attention")
        tab.fill("#sentence", "attention")
        tab.click("#look")
        tab.wait_for_selector("#map .token")
        assert tab.locator("#map .token").count() == 9 and tab.locator("#layer option").count() == 2


def focused(tab: Any) -> str:
    """Return what describes the element that has the focus."""
    about: str = tab.evaluate("(e => `${e.id || e.className} ${e.title}`)(document.activeElement)")
    return about


def tab_to(tab: Any, name: str, key: str = "Tab") -> None:
    for _ in range(60):
        if focused(tab).startswith(name):
            return
        tab.keyboard.press(key)
    raise AssertionError(f"{key} does not lead to {name}")


def take_another(tab: Any) -> None:
    """Open the alternatives of the token that has the focus, and take one that is not the token itself."""
    tab.keyboard.press("Enter")
    tab.keyboard.press("ArrowUp")  # the last
    if tab.evaluate("picked.title.startsWith(document.activeElement.firstChild.textContent)"):
        tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Enter")


@pytest.mark.browser
@pytest.mark.slow
def test_by_keyboard_alone_on_a_phone(tab: Any, place: Path) -> None:
    press = tab.keyboard.press
    with served("--ckpt_path", "letters.ckpt", cwd=place) as (url, _):
        tab.set_viewport_size({"width": 360, "height": 640})
        tab.goto(url)
        tab.wait_for_selector("#model option", state="attached")
        slide(tab, "max_tokens", 12)
        tab_to(tab, "prompt")
        tab.keyboard.type("To be")
        press("Control+Enter")
        tab.wait_for_selector("#more:not(:disabled)")
        # the tokens are one stop; arrows move among them, Enter opens the alternatives, Esc leads back
        tab_to(tab, "token")
        press("ArrowRight")
        press("ArrowRight")
        before, third = [tab.locator("#text .token").nth(i).get_attribute("title") for i in range(2)], focused(tab)
        press("Enter")
        assert tab.is_visible("#choices") and tab.locator("#choices").bounding_box()["width"] <= 360
        press("Escape")
        assert tab.is_hidden("#choices") and focused(tab) == third
        take_another(tab)
        tab.wait_for_selector("#more:not(:disabled)")
        after = [tab.locator("#text .token").nth(i).get_attribute("title") for i in range(3)]
        assert after[:2] == before and f"token {after[2]}" != third and focused(tab) == f"token {after[2]}"
        # the next tab; an answer goes on from an alternative of one of its tokens
        tab_to(tab, "tab-complete", "Shift+Tab")
        press("ArrowRight")
        assert focused(tab).startswith("tab-chat") and tab.is_visible("#message")
        tab_to(tab, "message")
        tab.keyboard.type("hello")
        press("Control+Enter")
        tab.wait_for_selector("#send:not(:disabled)")
        tokens = tab.locator(".message .token")
        said = [tokens.nth(i).get_attribute("title") for i in range(3)]
        tab_to(tab, "token", "Shift+Tab")
        press("ArrowRight")
        take_another(tab)
        tab.wait_for_selector("#send:not(:disabled)")
        now = [tokens.nth(i).get_attribute("title") for i in range(3)]
        assert now[0] == said[0] and now[1] != said[1] and tab.locator(".message").count() == 2
        assert tab.evaluate("talk.at(-1).content === written(talk.at(-1).tokens)")
        press("Alt+Digit4")
        assert focused(tab).startswith("sentence")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.browser
@pytest.mark.slow
def test_with_a_key_and_on_a_phone(tab: Any, place: Path) -> None:
    with served("--ckpt_path", "letters.ckpt", "--api_key_file", "key", cwd=place) as (url, _):
        tab.set_viewport_size({"width": 360, "height": 700})
        tab.goto(url)
        tab.wait_for_selector("#error:not([hidden])")
        assert "key is missing" in tab.inner_text("#error")
        tab.fill("#key", "open-sesame")
        tab.keyboard.press("Tab")
        tab.wait_for_selector("#model option", state="attached")
        assert tab.is_hidden("#error")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.click("#theme")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != dark
