"""The two web pages of the pipeline in a real browser: MLflow's page of a run and DVC's plots."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import vl_convert
from playwright.sync_api import Browser, Locator, Page, Route, ViewportSize, expect

from stages.runs.publish import connect
from stages.runs.run_record import COMMIT, EXPERIMENT
from tests.support.common import read_yaml, run, wait_for
from tests.support.project import clone, dvc, dvc_environment, runs
from tests.support.workspace import answers, serving

pytestmark = pytest.mark.proof

IMAGES = ["loss_by_position", "calibration", "attention", "positions", "embeddings"]
SVG = "window.vegaEmbed = (element, spec) => vegaEmbed(element, spec, {renderer: 'svg'})"


@pytest.fixture(scope="module")
def project(browser: Browser, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A clone in which the pipeline has run, so fast that MLflow has to be told to sample the system more often."""
    folder = clone(tmp_path_factory.mktemp("browser") / "a project", corpus, launch__processes=1, train__max_steps=200)
    dvc(folder, "repro", MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL="0.2")
    return folder


@pytest.fixture(scope="module")
def address(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the run's page on a real MLflow server."""
    store = f"sqlite:///{project / 'mlflow.db'}"
    with serving(tmp_path_factory.mktemp("server"), "--backend-store-uri", store) as server:
        wait_for(lambda: answers(server))
        (found,) = runs(project)
        path = f"experiments/{found.info.experiment_id}/runs/{found.info.run_id}"
        yield f"{server}/#/{path}?workflowType=machine_learning"


def test_the_table_of_runs_has_the_losses(page: Page, address: str, project: Path) -> None:
    page.goto(f"{address.partition('#')[0]}{connect(project, EXPERIMENT).loss_view()}")
    for metric in ("val/best_loss", "val/bits_per_char", "train/loss"):
        expect(page.get_by_role("columnheader", name=metric).first).to_be_visible()
    (found,) = runs(project)
    expect(page.get_by_role("gridcell", name=f"{found.data.metrics['val/best_loss']:.4f}").first).to_be_visible()


def test_the_models_tab_compares_models_and_links_to_their_versions(page: Page, address: str, project: Path) -> None:
    run([sys.executable, "-m", "stages.promote"], project, env=dvc_environment())
    page.set_viewport_size(ViewportSize(width=2400, height=800))
    page.goto(address.partition("/runs/")[0] + "/models?workflowType=machine_learning")
    for column in ("Source run", "Registered models", "Dataset", "val/best_loss"):
        expect(page.get_by_text(column, exact=True).first).to_be_visible()
    expect(page.get_by_text("dvc.yaml:train").first).to_be_visible()
    page.get_by_text("v1", exact=True).first.click()
    expect(page.get_by_role("heading", name="Version 1")).to_be_visible()
    expect(page.get_by_text("champion").first).to_be_visible()
    expect(page.get_by_role("cell", name="calibration error")).to_be_visible()


@pytest.fixture
def run_page(page: Page, address: str) -> Page:
    """MLflow's page of the run, in the training view."""
    page.goto(address)
    expect(page.get_by_role("tab", name="Overview")).to_be_visible()
    return page


def test_the_page_opens_in_the_training_view_and_fits_the_screen(run_page: Page) -> None:
    navigation = run_page.get_by_role("navigation")
    expect(navigation.get_by_text("Runs", exact=True)).to_be_visible()
    expect(navigation.get_by_text("Evaluation runs")).to_have_count(0)
    run_page.get_by_role("button", name="Expand description").click()
    expect(run_page.get_by_text("About this run")).to_be_in_viewport(ratio=1)


def test_the_description_shows_metrics_a_sample_and_commands(run_page: Page, project: Path) -> None:
    run_page.get_by_role("button", name="Expand description").click()
    description = run_page.get_by_test_id("note-editor-preview-content")
    metrics = json.loads((project / "metrics" / "evaluate.json").read_text())
    expect(description.get_by_role("cell", name=f"{metrics['val/bits_per_char']:.4f}").first).to_be_visible()
    blocks = [block.strip() for block in description.locator("pre").all_inner_texts()]
    assert (project / "generation_out.txt").read_text().strip() in blocks
    (found,) = runs(project)
    for part in (f"git checkout {found.data.tags[COMMIT]}", f"--run-id {found.info.run_id}", "gpt generate"):
        assert any(part in block for block in blocks)
    last = description.locator("pre").last
    last.scroll_into_view_if_needed()
    expect(last).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize(
    ("tab", "metrics"),
    [
        ("Model metrics", ["train/loss", "val/loss", "train/learning_rate", "val/bits_per_char"]),
        ("System metrics", ["system/cpu_utilization_percentage", "system/system_memory_usage_percentage"]),
    ],
)
def test_metrics_are_shown_as_charts(run_page: Page, tab: str, metrics: list[str]) -> None:
    run_page.get_by_role("tab", name=tab).click()
    for metric in metrics:
        run_page.get_by_placeholder("Search metric charts").fill(metric)
        expect(chart(run_page, metric).locator("svg .trace path").first).to_be_visible()


@pytest.mark.parametrize("view", ["run", "experiment"])
def test_charts_open_with_a_loss_curve(page: Page, address: str, view: str) -> None:
    """MLflow sorts groups and charts by name; a metric that has one value is a bar."""
    if view == "run":
        page.goto(address)
        page.get_by_role("tab", name="Model metrics").click()
    else:
        page.goto(f"{address.partition('/runs/')[0]}/runs?workflowType=machine_learning&compareRunsMode=CHART")
    loss = chart(page, "train/loss")
    expect(loss.locator("svg .scatterlayer .trace path").first).to_be_visible()
    expect(loss).to_be_in_viewport(ratio=1)
    expect(page.get_by_test_id("experiment-view-compare-runs-section-header").first).to_have_text(
        re.compile(r"^train\b")
    )
    first = page.get_by_test_id("experiment-view-compare-runs-card").first
    expect(first.locator("svg .scatterlayer .trace path").first).to_be_visible()


def chart(page: Page, metric: str) -> Locator:
    """The chart of a metric."""
    title = page.locator(f"h4[title='{metric}']")
    return page.get_by_test_id("experiment-view-compare-runs-card").filter(has=title)


def test_artifacts_are_listed_and_plots_are_displayed(run_page: Page, tmp_path: Path) -> None:
    run_page.get_by_role("tab", name="Artifacts").click()
    for name in ("chargpt_nano.pt", "params.yaml", "history.csv", "generation_out.txt"):
        expect(run_page.get_by_text(name, exact=True)).to_be_visible()
    run_page.get_by_text("pictures", exact=True).click()
    for name in (f"{image}.png" for image in IMAGES):
        run_page.get_by_text(name, exact=True).click()
        image = run_page.get_by_alt_text(f"pictures/{name}")
        expect(image).to_be_visible()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 400
        run_page.screenshot(path=tmp_path / name)


def test_dvc_renders_the_declared_plots(page: Page, project: Path) -> None:
    """The page loads Vega-Lite 5.2 from a CDN; the test serves the installed 5.8 instead.

    It renders SVG instead of a canvas, so that the test can read the labels.
    """
    bundle = vl_convert.javascript_bundle(SVG, vl_version="5.8")
    requested: list[str] = []
    errors: list[str] = []

    def answer(route: Route) -> None:
        requested.append(route.request.url.rpartition("/")[2].partition("@")[0])
        body = bundle if requested[-1] == "vega-embed" else ""
        route.fulfill(content_type="text/javascript; charset=utf-8", body=body)

    page.route("https://**/*", answer)
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    dvc(project, "plots", "show")
    page.goto((project / "dvc_plots" / "index.html").as_uri())
    for name, plot in (item for entry in read_yaml(project / "dvc.yaml")["plots"] for item in entry.items()):
        plot_svg = page.locator(f"#{name.replace(' ', '_')} svg.marks")
        drawn = plot_svg.locator(".mark-line path")
        columns = [names if isinstance(names, list) else [names] for names in plot["y"].values()]
        expect(drawn).to_have_count(2 * sum(map(len, columns)))  # a line for each column, raw and smoothed
        for line in drawn.all():
            expect(line).to_be_visible()  # false for a line without data
        for label in (plot["title"], plot.get("x_label", plot["x"]), plot["y_label"]):
            expect(plot_svg.get_by_text(label, exact=True)).to_be_visible()
    assert requested == ["vega", "vega-lite", "vega-embed"]
    assert not errors
