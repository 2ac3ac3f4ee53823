"""The page in a real browser, where one is installed: type, generate, look at probabilities, stop."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from autopar.serve.http.options import Options
from tests.serve_http_fakes import Story, serving, told

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
LONG = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser: Any, url: str, **context: Any) -> Any:
    """A page whose script's errors fail the test."""
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(15_000)
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(url)
    text_is(page, "#model", "story")
    return page


def text_is(page: Any, selector: str, text: str) -> None:
    """Waits until an element has a text."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(text, timeout=15_000)


def put(page: Any, **values: float) -> None:
    """Sets controls, be they shown or folded away."""
    page.evaluate("v => { for (const id in v) document.getElementById(id).value = v[id]; }", values)


def test_chat_by_keyboard_with_probabilities_and_stop(browser: Any):
    model = told(Story(LONG, pace=0.01, max_length=256, table_buckets=(8, 64)))
    with serving(model) as url:
        page = opened(browser, url)
        put(page, temperature=0)
        page.keyboard.type("Hey")
        page.keyboard.press("Enter")
        page.wait_for_selector(".assistant .token >> nth=20")
        page.keyboard.press("Escape")
        page.wait_for_selector(".facts")
        assert "stopped by you" in page.inner_text(".facts")
        said = page.inner_text(".assistant .said")
        assert 20 <= len(said) < len(LONG) and said in LONG
        page.locator(".token").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.textContent") == said[1]
        assert "%" in page.inner_text("#tip .chosen")
        text_is(page, "#running", "0")
        page.click("#plan summary")
        text_is(page, "#nopicture", "There is no picture of this plan.")
    assert model.engine.metrics().finished["cancelled"] == 1


def test_completion_on_a_phone(browser: Any):
    with serving(told(Story(LONG, max_length=256, table_buckets=(8, 64)), template=None)) as url:
        page = opened(browser, url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
        assert page.is_checked("[value=text]") and page.is_disabled("[value=chat]")
        page.fill("#prompt", LONG[:10])
        put(page, temperature=0, max_tokens=30)
        page.tap("#go")
        page.wait_for_selector(".facts")
        assert page.text_content(".assistant .said") == LONG[:40]
        for width in (360, 320):
            page.set_viewport_size({"width": width, "height": 740})
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_key_is_asked_for_and_errors_are_shown(browser: Any):
    model = told(Story(LONG))
    with serving(model, Options(keys=frozenset({"sesame"}))) as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#ask[open]")
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        text_is(page, "#model", "story")
        page.fill("#prompt", "x" * 300)
        page.keyboard.press("Enter")
        assert "the longest sequence is 128 tokens" in page.inner_text(".error")
        assert page.input_value("#prompt") == "x" * 300
