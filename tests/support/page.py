"""The page of `gpt serve`: a real server, and what a user does on the page."""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

from tests.conftest import call_main
from tests.support.common import FAST, environment, free_port, train_line, wait_for, write_params
from tests.support.workspace import answers

LENGTHS = """() => {
    window.lengths = [];
    const text = document.querySelector("#frame .text");
    new MutationObserver(() => window.lengths.push(text.children.length)).observe(text, {childList: true});
}"""
CONTRASTS = """() => [...document.querySelectorAll(".chip")].map((chip) => {
    const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const luminance = (...colours) => {
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        const [red, green, blue] = [...canvas.getImageData(0, 0, 1, 1).data].map((byte) => byte / 255).map((value) =>
            value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const panel = getComputedStyle(document.querySelector("main > *")).backgroundColor;
    const style = getComputedStyle(chip);
    const both = [luminance(style.color), luminance(panel, style.backgroundColor)];
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
})"""
ROW = "row => [...row.children].map((cell) => cell.textContent).concat(row.querySelector('.after').offsetWidth)"


def train_kind(folder: Path, tokens: Path, kind: str) -> Path:
    """Train a model of a kind for 100 steps; returns its checkpoint, which is named after the kind."""
    write_params(folder / "params.yaml", **FAST, train__max_steps=100, model__dropout=0.0, model__kind=kind)
    with chdir(folder):
        assert call_main(*train_line(tokens)) == 0
    return (folder / "model.pt").rename(folder / f"{kind}.pt")


@contextmanager
def serving_gpt(checkpoints: Sequence[Path], **variables: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The address of a real server of these models, and its process."""
    port = free_port()
    models = [word for path in checkpoints for word in ("--checkpoint", str(path))]
    command = [sys.executable, "-m", "gpt", "serve", *models, "--port", str(port)]
    process = subprocess.Popen(command, cwd=checkpoints[0].parent, env=environment(**variables))
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}"))
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait(20)


class Explorer:
    """The page, as its user sees it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.status, self.prompt = page.locator("#status"), page.get_by_role("textbox", name="Prompt")
        self.tokens, self.alternatives = page.locator("#frame .token"), page.locator("#frame .popover button")

    def open(self, address: str, prompt: str) -> "Explorer":
        self.page.goto(address)
        expect(self.page.get_by_role("combobox", name="Model", exact=True)).not_to_have_value("")
        self.prompt.fill(prompt)
        return self

    def number(self, name: str) -> Locator:
        return self.page.get_by_role("spinbutton", name=name)

    def press(self, name: str) -> None:
        """Press a button; of several with this name, the first one."""
        self.page.get_by_role("button", name=name, exact=True).first.click()

    def start(self, length: int, seed: int = 7) -> None:
        """Start to generate a text."""
        self.number("Length").fill(str(length))
        self.number("Seed").fill(str(seed))
        self.press("Generate")

    def generate(self, length: int, seed: int = 7) -> str:
        """Generate a text; returns all of it, with its prompt."""
        self.start(length, seed)
        return self.finished(length)

    def finished(self, length: int) -> str:
        """Wait for the end of the text, and return it."""
        expect(self.status).to_contain_text(f"{length} tokens in")
        return str(self.page.locator("#frame .text").evaluate("text => text.textContent"))

    def distribution(self) -> list[tuple[str, ...]]:
        """The rows of the next-token distribution, with the widths of the bars after the settings."""
        self.page.wait_for_timeout(500)  # for an answer, and until the bars have moved
        return [tuple(map(str, row.evaluate(ROW))) for row in self.page.locator("#distribution tr").all()]


def probability(text: str | None) -> float:
    """The percentage in a text, as a number from 0 to 1."""
    found = re.search(r"([\d.]+)%", text or "")
    assert found, text
    return float(found[1]) / 100


def background(token: Locator) -> float:
    """The opacity of the colour behind a token."""
    colour = str(token.evaluate("token => getComputedStyle(token).backgroundColor"))
    return float(colour.rstrip(")").split("/")[1]) if "/" in colour else float("rgba" not in colour)


def contrasts(page: Page) -> list[float]:
    """The contrast ratio of the text on each colour of the legend."""
    return [float(ratio) for ratio in page.evaluate(CONTRASTS)]
