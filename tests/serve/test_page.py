"""The page in a headless Chromium: it works by keyboard, fits a phone, loads nothing from elsewhere, and shows text as text."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from serving import serving, wait_idle

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is NOT TESTED: playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is NOT TESTED: there is no Chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: SimpleNamespace) -> Iterator[Any]:
    """The page, connected; at the end nothing went to the console and nothing to another host."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda said: trouble.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(request.url) if not request.url.startswith(server.url) else None)
    page.goto(server.url)
    until(page, "document.getElementById('state').textContent === 'connected'")
    yield page
    context.close()
    assert trouble == []


def until(page: Any, expression: str, seconds: float = 20) -> None:
    """Playwright's own waiting runs eval in the page, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def say(page: Any, text: str) -> str:
    """Type `text` and Enter where the focus is; the answer with its note."""
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.turn:last-child small')")
    return str(page.locator(".turn").last.inner_text())


def test_a_conversation_by_keyboard_alone(page: Any, server: SimpleNamespace) -> None:
    places = []
    while "text" not in places:
        page.keyboard.press("Tab")
        places.append(page.evaluate("document.activeElement.id"))
        assert len(places) < 8, places
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "bits"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#bits-note").inner_text() == "3 bits: fast"
    page.keyboard.press("Shift+Tab")
    answer = say(page, "Tell me of a dog.")
    assert re.search(r"^tiny\n[\s\S]+\d+ tokens in [\d.]+ s at [23]\.\d bits$", answer), answer
    assert page.evaluate("document.activeElement.id") == "text", "one can go on typing"
    say(page, "And then?")
    assert page.locator(".turn").count() == 4 and page.evaluate("turns.length") == 4
    label = page.locator("#grid").get_attribute("aria-label")
    assert re.fullmatch(r"[1-9]\d* of 64 experts are in memory, with [2-8]\.\d bits on average", label), label
    lit = "[...document.getElementById('grid').getContext('2d').getImageData(0, 0, 64, 64).data].some((v) => v > 0 && v < 255)"
    assert page.evaluate(lit)


def test_markup_of_models_and_users_stays_text(page: Any) -> None:
    evil = '<img src=x onerror="window.bad = 1"><script>window.bad = 1</script>'
    events = [{"choices": [{"delta": {"content": evil[:20]}}]}, {"choices": [{"delta": {"content": evil[20:]}}]}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.locator("#text").fill(evil)
    page.locator("#text").press("Enter")
    until(page, "turns.length === 2")
    assert [t.split("\n", 1)[1] for t in page.locator(".turn").all_inner_texts()] == [evil, evil]
    assert page.locator(".turn img, .turn script").count() == 0 and page.evaluate("window.bad") is None


def test_an_answer_can_be_stopped(page: Any, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    step = server.service.engine.step
    monkeypatch.setattr(server.service.engine, "step", lambda chunks: (time.sleep(0.02), step(chunks))[1])
    monkeypatch.setattr(type(server.service.model), "eos_ids", frozenset())
    page.locator("summary").click()
    page.locator("#tokens").fill("2000")
    page.locator("#text").fill("Once")
    page.locator("#text").press("Enter")
    until(page, "document.querySelectorAll('.turn')[1]?.innerText.length > 20")
    page.locator("#stop").click()
    until(page, "document.querySelector('.turn:last-child small')?.textContent === 'stopped'")
    wait_idle(server, 5)


def test_the_budget_can_be_changed(page: Any, server: SimpleNamespace) -> None:
    whole = server.service.engine.budget.memory
    page.locator("#budget-size").fill(str(whole + 10**8))
    page.locator("#budget button").click()
    until(page, "document.getElementById('budget-note').textContent === 'set'")
    assert server.service.engine.budget.memory == whole + 10**8
    assert page.locator("#memory-note").inner_text().endswith(f"of {(whole + 10**8) / 1e6:.1f} MB")


def test_the_policy_can_be_changed_and_its_heat_is_seen(page: Any, server: SimpleNamespace) -> None:
    page.locator("#policy").focus()
    assert page.locator("#policy").input_value() == "hebf"
    page.locator("#policy").select_option("lru")
    until(page, "document.getElementById('policy-note').textContent === 'set'")
    assert server.service.engine.policy.name == "lru"
    page.locator("#text").focus()
    say(page, "Tell me of a cat.")
    until(page, "before.state.heat.some((row) => /[5-9]/.test(row))")
    page.locator("#policy").select_option("hebf")
    until(page, "before.state.policy === 'hebf'")


@pytest.mark.parametrize("width", [320, 390])
def test_it_fits_a_phone(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    say_box = page.locator("#text")
    say_box.fill("x" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#text", "#bits", "#send", "#grid", "#memory", "#budget-size", "#policy"):
        box = page.locator(selector).bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 40, selector


def test_a_plain_model_and_a_key(browser: Any) -> None:
    from d2moe.serve.gate import Guard

    with serving(template=None, guard=Guard(api_key="k9")) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.locator("#key").fill("k9")
        page.locator("#key").press("Enter")
        until(page, "document.getElementById('state').textContent === 'connected'")
        assert page.locator("#hint").is_visible() and not page.locator("#key-form").is_visible()
        page.locator("#text").focus()
        assert re.search(r"at [34]\.\d bits", say(page, "Once upon a time"))
        context.close()
