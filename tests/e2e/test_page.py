"""The page of `gpt serve` in a real browser, with a real server and models that were trained for a few steps."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, expect

import gpt
from gpt.evaluation.interpretability import inspect_model
from tests.support.page import LENGTHS, Explorer, background, contrasts, probability, serving_gpt, train_kind

pytestmark = pytest.mark.proof

PROMPT = "the quick "
TEXT = "the lazy fox jum"
STAGES = {"raw": "Before mask", "masked": "After mask", "weights": "After softmax"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> list[Path]:
    return [train_kind(tmp_path_factory.mktemp("models"), tokens, kind) for kind in ("gpt", "bigram")]


@pytest.fixture(scope="module")
def address(checkpoints: list[Path]) -> Iterator[str]:
    with serving_gpt(checkpoints) as (found, _):
        yield found


@pytest.fixture
def explorer(page: Page, address: str, console: list[str]) -> Explorer:
    """The page with a prompt."""
    return Explorer(page).open(address, PROMPT)


def test_text_streams_in_coloured_by_probability(explorer: Explorer) -> None:
    explorer.page.evaluate(LENGTHS)
    text = explorer.generate(60)
    assert len(set(explorer.page.evaluate("lengths"))) > 10
    assert (text[: len(PROMPT)], len(text)) == (PROMPT, len(PROMPT) + 60)
    expect(explorer.page.locator("#frame .prompt")).to_have_count(len(PROMPT))
    tokens = explorer.tokens.all()[1:]  # nothing predicts the first one
    found = [(probability(token.get_attribute("aria-label")), background(token)) for token in tokens]
    likely, unlikely = max(found), min(found)
    assert likely[0] > 0.9 > 0.2 > unlikely[0]
    assert likely[1] < 0.1 < unlikely[1]


def test_stop_ends_the_stream(explorer: Explorer) -> None:
    explorer.start(4096)
    expect(explorer.tokens.nth(30)).to_be_attached()
    explorer.press("Stop")
    expect(explorer.status).to_contain_text("Stopped after")
    count = explorer.tokens.count()
    explorer.page.wait_for_timeout(500)
    assert count == explorer.tokens.count() < 4096


def test_another_seed_changes_the_text_and_a_reload_keeps_the_settings(explorer: Explorer) -> None:
    first = explorer.generate(60, seed=7)
    explorer.press("Another seed")
    other, seed = explorer.finished(60), int(explorer.number("Seed").input_value())
    assert (first, 7) != (other, seed)
    explorer.page.wait_for_timeout(500)  # until the settings are in the address
    explorer.page.reload()
    expect(explorer.number("Seed")).to_have_value(str(seed))
    assert explorer.generate(60, seed=seed) == other != first
    assert explorer.generate(60, seed=7) == first


@pytest.mark.parametrize(
    ("slider", "key", "presses", "kept"),
    [
        ("Temperature", "Home", 1, 1), ("Top-k", "ArrowRight", 3, 3), ("Top-p", "Home", 1, 1),
        ("Min-p", "End", 1, None), ("Repetition penalty", "End", 1, 28),
    ],
)  # fmt: skip
def test_sliders_change_the_distribution(
    explorer: Explorer, slider: str, key: str, presses: int, kept: int | None
) -> None:
    explorer.prompt.fill("seven wizards b")
    before = explorer.distribution()
    for _ in range(presses):
        explorer.page.get_by_role("slider", name=slider).press(key)
    after = explorer.distribution()
    assert [row[:3] for row in before] == [row[:3] for row in after]  # the model's own distribution
    assert [row[3:] for row in before] != [row[3:] for row in after]
    if kept:
        expect(explorer.page.locator("#kept")).to_contain_text(f"{kept} of 28 tokens")
    explorer.press("Reset sliders")
    assert explorer.distribution() == before


def test_hovering_shows_five_alternatives_and_a_click_goes_on_from_there(explorer: Explorer) -> None:
    text, place = explorer.generate(60), len(PROMPT) + 20
    explorer.tokens.nth(place).hover()
    expect(explorer.alternatives).to_have_count(5)
    probabilities = [probability(button.text_content()) for button in explorer.alternatives.all()]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) < 1.02  # they are rounded
    other = next(each for each in explorer.alternatives.all() if "chosen" not in str(each.get_attribute("class")))
    token = str(other.locator("b").text_content()).replace("␣", " ").replace("↵", "\n")
    other.click()
    expect(explorer.prompt).to_have_value(text[:place] + token)
    assert text[place] != token
    assert explorer.finished(60).startswith(text[:place] + token)


def test_the_keyboard_alone_suffices(explorer: Explorer) -> None:
    keyboard, page = explorer.page.keyboard, explorer.page
    explorer.number("Length").fill("40")
    explorer.prompt.press("Control+Enter")
    text = explorer.finished(40)
    while page.evaluate("document.activeElement.className") != "text":
        keyboard.press("Tab")
        assert page.evaluate("document.activeElement !== document.body")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keyboard.press("End")
    keyboard.press("ArrowLeft")
    expect(page.locator("#frame").get_by_role("option", selected=True)).to_have_attribute(
        "id", f"text-1-{len(text) - 2}"
    )
    keyboard.press("Enter")
    keyboard.press("ArrowDown")
    expect(explorer.alternatives.nth(1)).to_be_focused()
    keyboard.press("Enter")
    expect(explorer.prompt).to_have_value(re.compile(f"{re.escape(text[:-2])}.", re.DOTALL))
    assert explorer.finished(40).startswith(text[:-2])


@pytest.mark.parametrize(
    ("stage", "layer", "head", "row", "column"),
    [
        ("raw", 1, 2, 3, 9),
        ("raw", 2, 1, 9, 3),
        ("masked", 2, 2, 8, 8),
        ("weights", 1, 1, 15, 1),
        ("weights", 2, 2, 7, 2),
    ],
)
def test_look_inside_shows_the_attention_of_the_model(
    explorer: Explorer, checkpoints: list[Path], stage: str, layer: int, head: int, row: int, column: int
) -> None:
    page, loaded = explorer.page, gpt.load(checkpoints[0])
    tokens = [int(token) for token in loaded.tokenizer.encode(TEXT)]
    attention = inspect_model(loaded.module, tokens, loaded.tokenizer.decode).attention
    value = getattr(attention, stage)[layer - 1, head - 1, row, column]
    explorer.prompt.fill(TEXT)
    page.get_by_role("combobox", name="Layer").select_option(str(layer))
    page.get_by_role("combobox", name="Head").select_option(str(head))
    page.get_by_role("radio", name=STAGES[stage]).check()
    expect(page.locator("#matrix .cells rect")).to_have_count(16 * 16)
    expect(page.locator("#matrix .hidden-key")).to_have_count(0 if stage == "raw" else 16 * 15 // 2)
    page.wait_for_timeout(500)  # the picture of the first layer and head is replaced
    page.locator(f"#matrix [data-row='{row}'][data-column='{column}']").hover()
    quantity, key = "weight" if stage == "weights" else "score", TEXT[column].replace(" ", "␣")
    wanted = f"Query {row + 1} ‘{TEXT[row].replace(' ', '␣')}’: {quantity} of key {column + 1} ‘{key}’ {value:.2f}"
    expect(page.locator("#attention-value")).to_have_text(wanted.replace("-", "−"))
    assert 0 < page.locator("#arcs .own path").count() <= (16 if stage == "raw" else row + 1)


def test_look_inside_follows_the_query_to_the_ngrams_and_shows_positions(explorer: Explorer) -> None:
    page = explorer.page
    explorer.prompt.fill(TEXT)
    expect(page.locator("#ngrams .ngram")).to_have_text(["um", "jum", "␣jum", "x␣jum"])
    page.locator("#arcs [data-row='7']").hover()
    expect(page.locator("#attention-value")).to_contain_text("Query 8 ‘y’")
    expect(page.locator("#ngrams .ngram")).to_have_text(["zy", "azy", "lazy", "␣lazy"])
    page.locator("#matrix").press("ArrowUp")
    expect(page.locator("#attention-value")).to_contain_text("Query 7 ‘z’")
    page.locator("#positions").press("ArrowRight")
    expect(page.locator("#position-value")).to_have_text("dimension 1, position 1: 0.54")  # the cosine of 1
    colours = "canvas => new Set(new Uint32Array(canvas.getContext('2d').getImageData(0, 0, 32, 8).data.buffer)).size"
    assert page.locator("#positions").evaluate(colours) > 50


def test_two_models_side_by_side(explorer: Explorer) -> None:
    text, page = explorer.generate(60), explorer.page
    expect(page.get_by_role("combobox", name="Model B")).to_have_value("bigram")
    explorer.press("Generate with both")
    summaries, (first, second) = page.locator("#compare .value"), page.locator("#compare .text").all()
    expect(summaries).to_contain_text(["bits per token over 60 generated tokens"] * 2)
    assert first.text_content() == text != second.text_content()
    assert str(second.text_content()).startswith(PROMPT)
    explorer.press("Score the text above with both")
    # Only the context window of 32 tokens is scored, of which nothing predicts the first one.
    expect(summaries).to_contain_text(["over 31 tokens"] * 2)
    assert [first.text_content(), second.text_content()] == [text, text]
    bits = [float(summary.split()[0]) for summary in summaries.all_text_contents()]
    assert bits[0] < bits[1]  # the model that wrote the text finds it more likely
    page.get_by_role("combobox", name="Model", exact=True).select_option("bigram")
    expect(page.get_by_text("This model has no attention")).to_be_visible()
    expect(page.locator("#matrix")).to_be_hidden()


def test_an_unknown_character_is_reported_until_it_is_removed(explorer: Explorer, console: list[str]) -> None:
    explorer.prompt.fill("the ß")
    expect(explorer.status).to_contain_text("text: expected only the 28 characters")
    expect(explorer.status).to_be_in_viewport(ratio=1)
    explorer.press("Generate")
    expect(explorer.status).to_contain_text("prompt: expected only the 28 characters")
    assert console
    assert all("status of 400" in error for error in console)
    console.clear()
    explorer.prompt.fill(PROMPT)
    expect(explorer.status).to_be_empty()
    assert explorer.generate(60).startswith(PROMPT)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_server_that_was_killed_is_reported(page: Page, checkpoints: list[Path], *, streaming: bool) -> None:
    with serving_gpt(checkpoints) as (address, process):
        explorer = Explorer(page).open(address, PROMPT)
        if streaming:
            explorer.start(4096)
            expect(explorer.tokens.nth(20)).to_be_attached()
        process.kill()
        process.wait(20)
        if not streaming:
            page.get_by_role("slider", name="Temperature").press("Home")
        expect(explorer.status).to_contain_text("The server does not answer.")
        expect(page.locator("#stop")).to_be_disabled()


def test_a_server_with_a_key_asks_for_it(page: Page, checkpoints: list[Path]) -> None:
    with serving_gpt(checkpoints, CHARGPT_API_KEY="secret") as (address, _):
        page.goto(address)
        expect(page.locator("#status")).to_contain_text("needs an API key")
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_label("API key")).to_be_hidden()
        assert len(Explorer(page).generate(60)) == 60


def test_a_phone_shows_everything_without_horizontal_scrolling(browser: Browser, address: str, tmp_path: Path) -> None:
    with browser.new_context(viewport={"width": 375, "height": 800}, has_touch=True, is_mobile=True) as context:
        explorer = Explorer(context.new_page()).open(address, PROMPT)
        explorer.generate(300)
        explorer.tokens.nth(30).tap()
        expect(explorer.alternatives.last).to_be_in_viewport(ratio=1)
        expect(explorer.page.locator("#matrix .cells rect").first).to_be_visible()
        assert explorer.page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [375, 375]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_text_is_readable_on_every_colour(explorer: Explorer, scheme: Literal["light", "dark"]) -> None:
    explorer.page.emulate_media(color_scheme=scheme)
    assert [ratio > 4.5 for ratio in contrasts(explorer.page)] == [True] * 4  # WCAG 2.2, success criterion 1.4.3
