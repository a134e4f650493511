"""The two pages that a user looks at, in a real browser: MLflow's of a run, and DVC's of the plots."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, ViewportSize, expect, sync_playwright
from ruamel.yaml import YAML

from tests.support.project import clone, dvc, rows, set_processes
from tests.support.workspace import answers, serving, wait_for

pytestmark = pytest.mark.proof

SCREEN = ViewportSize(width=1920, height=1080)
PATIENCE_MS = 60_000  # other work may run on the same cores
PLOTS = {"loss", "learning rate", "loss by position", "calibration"}
PICTURES = ["loss.png", "learning_rate.png", "loss_by_position.png", "calibration.png"]
PICTURES += ["attention.png", "positions.png", "embeddings.png"]
SVG = "window.vegaEmbed = (place, spec) => vegaEmbed(place, spec, {renderer: 'svg'})"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium without a window."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.fail("no 'chromium' on PATH; install it (Debian: apt-get install chromium)", pytrace=False)
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses root otherwise
        yield playwright.chromium.launch(executable_path=chromium, args=sandbox)


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """An empty page; what it showed at the test's end is tmp_path / "end.png"."""
    with browser.new_context(viewport=SCREEN) as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        yield page
        page.screenshot(path=tmp_path / "end.png", full_page=True)


@pytest.fixture(scope="module")
def project(browser: Browser, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A clone, the pipeline run once."""
    folder = clone(tmp_path_factory.mktemp("a clone") / "of it", corpus)
    set_processes(folder, 1)
    dvc(folder, "repro")
    return folder


@pytest.fixture(scope="module")
def address(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The run's page on a real server over the clone's store."""
    store = f"sqlite:///{project / 'mlflow.db'}"
    with serving(tmp_path_factory.mktemp("server"), "--backend-store-uri", store) as server:
        wait_for(lambda: answers(server))
        (row,) = rows(project)
        run = f"experiments/{row.info.experiment_id}/runs/{row.info.run_id}"
        yield f"{server}/#/{run}?workflowType=machine_learning"


@pytest.fixture
def run(page: Page, address: str) -> Page:
    """MLflow's page of the run, in the view for training."""
    page.goto(address)
    expect(page.get_by_role("tab", name="Overview")).to_be_visible()
    return page


def test_the_description_tells_figures_sample_and_commands(run: Page, project: Path) -> None:
    run.get_by_role("button", name="Expand description").click()
    description = run.get_by_test_id("note-editor-preview-content")
    figures = json.loads((project / "metrics" / "evaluate.json").read_text())
    row = description.get_by_role("row").filter(has_text="bits a character, on the whole validation split")
    expect(row.get_by_role("cell").last).to_have_text(f"{figures['bits_per_char']:.4f}")
    blocks = description.locator("pre")
    expect(blocks).to_have_count(3)
    sample, everything, checkpoint = blocks.all_inner_texts()
    assert sample.strip() == (project / "generation_out.txt").read_text().strip()
    (found,) = rows(project)
    assert everything.startswith(f"git checkout {found.data.tags['git.commit']}\nmlflow artifacts download ")
    assert "\ndvc repro\n" in everything
    assert f"--run-id {found.info.run_id}" in checkpoint
    assert "python -m gpt generate --checkpoint restored/chargpt_nano.pt" in checkpoint
    blocks.last.scroll_into_view_if_needed()
    expect(blocks.last).to_be_in_viewport(ratio=1)


def test_the_page_opens_in_the_view_for_training_with_all_columns_on_the_screen(run: Page) -> None:
    view = run.get_by_role("navigation")
    expect(view.get_by_text("Runs", exact=True)).to_be_visible()
    expect(view.get_by_text("Evaluation runs")).to_have_count(0)
    run.get_by_role("button", name="Expand description").click()
    expect(run.get_by_text("About this run")).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize(
    ("tab", "metrics"),
    [
        ("Model metrics", ["train_loss", "val_loss", "learning_rate", "eval_bits_per_char"]),
        ("System metrics", ["system/cpu_utilization_percentage", "system/system_memory_usage_percentage"]),
    ],
)
def test_metrics_are_charts(run: Page, tab: str, metrics: list[str]) -> None:
    run.get_by_role("tab", name=tab).click()
    for metric in metrics:
        run.get_by_placeholder("Search metric charts").fill(metric)
        title = run.locator(f"h4[title='{metric}']")
        card = run.get_by_test_id("experiment-view-compare-runs-card").filter(has=title)
        expect(card.locator("svg .trace path").first).to_be_visible()


def test_artifacts_are_there_and_pictures_are_shown(run: Page, tmp_path: Path) -> None:
    run.get_by_role("tab", name="Artifacts").click()
    for name in ("chargpt_nano.pt", "params.yaml", "history.csv", "generation_out.txt"):
        expect(run.get_by_text(name, exact=True)).to_be_visible()
    run.get_by_text("pictures", exact=True).click()
    for name in PICTURES:
        run.get_by_text(name, exact=True).click()
        picture = run.get_by_alt_text(f"pictures/{name}")
        expect(picture).to_be_visible()
        assert picture.evaluate("picture => picture.decode().then(() => picture.naturalWidth)") > 400
        run.screenshot(path=tmp_path / name)


def test_dvc_draws_the_declared_plots(page: Page, project: Path) -> None:
    """The page takes Vega from a CDN; here an installed Vega-Lite 5.8 answers in the place of its 5.2.

    It is told to draw SVG instead of on a canvas, so that the words in the pictures can be read.
    """
    bundle = vl_convert.javascript_bundle(SVG, vl_version="5.8")
    asked, complaints = [], []

    def answer(route: Route) -> None:
        asked.append(route.request.url.rpartition("/")[2].partition("@")[0])
        body = bundle if asked[-1] == "vega-embed" else ""
        route.fulfill(content_type="text/javascript; charset=utf-8", body=body)

    def listen(message: ConsoleMessage) -> None:
        if message.type == "error":
            complaints.append(message.text)

    page.route("https://**/*", answer)
    page.on("console", listen)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    dvc(project, "plots", "show")
    page.goto((project / "dvc_plots" / "index.html").as_uri())
    entries = YAML(typ="safe").load(project / "dvc.yaml")["plots"]
    declared = {name: plot for entry in entries for name, plot in entry.items()}
    assert set(declared) == PLOTS
    for name, plot in declared.items():
        picture = page.locator(f"#{name.replace(' ', '_')} svg.marks")
        drawn = picture.locator(".mark-line path")
        expect(drawn).to_have_count(2 * lines(plot))  # each as it is, and smoothed
        for line in drawn.all():
            expect(line).to_be_visible()  # which a line without height, of no numbers, is not
        for words in (plot["title"], plot.get("x_label", plot["x"]), plot["y_label"]):
            expect(picture.get_by_text(words, exact=True)).to_be_visible()
    assert asked == ["vega", "vega-lite", "vega-embed"]
    assert not complaints


def lines(plot: dict[str, Any]) -> int:
    """How many lines a plot declares: one a column."""
    return sum(1 if isinstance(columns, str) else len(columns) for columns in plot["y"].values())
