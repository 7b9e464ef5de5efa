"""The dashboard in a real browser: the page follows the study, Optuna's side shows the front, nothing leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lpsearch.search import StudyStore
from tests.browsing import (
    CHARTS,
    REAL_MODEL,
    Opened,
    count_drawn,
    get_shown_plans,
    join_groups,
    on_the_tiny_model,
    open_in_browser,
    point_at,
)
from tests.dashboards.serving import hold_study, serve
from tests.report.conftest import MakeStudy

pytestmark = pytest.mark.browser


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Return a function that opens a page; at the end, complaints and requests are looked at."""
    everything: list[tuple[Opened, str]] = []

    def open_it(url: str, path: str = "", **options: Any) -> Opened:
        everything.append((open_in_browser(browser, url + path, **options), url))
        return everything[-1][0]

    yield open_it
    for opened, url in everything:
        assert opened.complaints == []
        assert [sent for sent in opened.requests if not sent.startswith((url, "data:", "blob:"))] == []
        opened.page.context.close()


@pytest.fixture(scope="module")
def served(searched_study: tuple[Path, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Serve the study of a model; return what opening a page of it needs."""
    out, front = searched_study
    with serve(out) as url:
        yield {"url": url, "out": out, "front": front}


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (900, "light"), (1400, "dark")])
def test_every_figure_of_the_live_page_is_drawn(
    open_page: Any, served: dict[str, Any], width: int, scheme: str
) -> None:
    page = open_page(**served, width=width, scheme=scheme).page
    for name in CHARTS:
        assert count_drawn(page, name) > 0, name
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out of the page"
    assert page.get_attribute("#live", "data-state") == "done"


@on_the_tiny_model
def test_hover_names_groups_and_a_click_shows_plan_and_commands(open_page: Any, served: dict[str, Any]) -> None:
    opened = open_page(**served)
    opened.page.check("#all-losses")
    for index in (len(opened.front) - 1, 1):
        point_at(opened.page, index)
        label = opened.page.text_content("#chart-front .hoverlayer .hovertext")
        for group in join_groups(opened, index).split():
            assert group in label
        opened.page.mouse.down()
        opened.page.mouse.up()
        opened.page.wait_for_selector(f"#plan-{index}", state="visible")
        assert get_shown_plans(opened.page) == [index]
        lines = opened.page.eval_on_selector_all(f"#plan-{index} code", "all => all.map((one) => one.textContent)")
        assert str(opened.out / opened.front[index]["plan"]) in lines[0]


@pytest.mark.parametrize(
    ("searched_study", "width"),
    [("tiny", 400), pytest.param("smollm2-135m", 1400, marks=REAL_MODEL.marks)],
    indirect=["searched_study"],
    scope="session",
)
def test_optuna_dashboard_shows_the_front(open_page: Any, served: dict[str, Any], width: int) -> None:
    opened = open_page(**served, width=width)
    opened.page.click("#live a")
    figure = "[id='user-defined-plot:lpsearch-front']"
    opened.page.wait_for_selector(f"{figure} .scatterlayer .points path")
    drawn = opened.page.evaluate(
        "(figure) => document.querySelector(figure).data.find((trace) => trace.name === 'front').y.length", figure
    )
    assert drawn == len(opened.front)
    text = opened.page.inner_text("body")
    for point in opened.front:
        assert Path(point["plan"]).name in text, "plan files are artifacts"
    opened.page.goto(opened.page.url + "/note")
    opened.page.wait_for_selector("table")
    assert opened.page.locator("table tbody tr").count() == len(opened.front)
    opened.page.click("text=lpsearch >> nth=-1")
    opened.page.wait_for_selector("#chart-front .main-svg")


@on_the_tiny_model
def test_optuna_dashboard_shows_a_front_trial(open_page: Any, served: dict[str, Any]) -> None:
    from lpsearch.plan import load_plan

    index = len(served["front"]) - 1
    plan = load_plan(served["out"] / served["front"][index]["plan"])
    opened = open_page(
        **served, path=f"dashboard/studies/1/trials?numbers={plan.metadata.provenance.trial}", until="text=On the front"
    )
    text = opened.page.inner_text("body")
    assert plan.key in text, "the groups are not cut"
    assert f"layers together: {join_groups(opened, index)}" in text
    assert "vllm serve" in text


def test_the_page_follows_the_study_and_leaves_the_reader_alone(
    open_page: Any, make_study: MakeStudy, tmp_path: Path
) -> None:
    report = make_study(budget=12, files=False, heldout=False)
    front = [{} for _ in report.front]
    with serve(tmp_path) as url:
        with hold_study(tmp_path):
            opened = open_page(url, out=tmp_path, front=front)
            page = opened.page
            assert page.get_attribute("#live", "data-state") == "searching"
        page.wait_for_selector("#live[data-state='interrupted']")
        page.evaluate("window.isSamePage = true")
        before = page.evaluate("document.getElementById('chart-front').data.map((trace) => trace.x.length)")
        page.click("#theme")
        page.click("#front summary")
        page.select_option("#front select >> nth=1", "perplexity")
        page.click("#front table [data-show='0']")
        page.focus("#chart-front")
        page.evaluate("window.scrollTo(0, 300)")

        make_study(budget=24, files=False, heldout=False)
        page.wait_for_selector("#live-message:has-text('24 plans')")
        page.wait_for_selector("#chart-front[data-drawn$='perplexity']")
        after = page.evaluate("document.getElementById('chart-front').data.map((trace) => trace.x.length)")
        assert sum(after) > sum(before)
        assert page.evaluate("window.isSamePage"), "the page was not loaded again"
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.evaluate("document.getElementById('chart-front').layout.paper_bgcolor") == "#14181d"
        assert page.evaluate("document.querySelector('#front details').open")
        assert page.input_value("#front select >> nth=1") == "perplexity"
        assert get_shown_plans(page) == [0]
        assert page.evaluate("document.activeElement.id") == "chart-front"
        assert page.evaluate("window.scrollY") == 300
        assert page.locator("#plan-0 .commands").count() == 0

        final = make_study(budget=24)
        page.wait_for_selector("#live[data-state='done']")
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#plan-1 .commands", state="visible")
        assert page.inner_text("#plan-1 code >> nth=0").split()[:2] == ["lpsearch", "evaluate"]
        assert page.locator("#front tbody tr").count() == len(final.front)
        for name in CHARTS:
            assert count_drawn(page, name) > 0, name


def test_the_chosen_plan_stays_as_the_front_grows_below_it(
    open_page: Any, make_study: MakeStudy, tmp_path: Path
) -> None:
    report = make_study(budget=18)
    with serve(tmp_path) as url:
        page = open_page(url, out=tmp_path, front=[{} for _ in report.front]).page
        index = len(report.front) - 1
        trial = report.front[index].trial
        page.click("#front summary")
        page.click(f"#front table [data-show='{index}']")
        assert get_shown_plans(page) == [index]
        before = page.inner_text(f"#plan-{index} code >> nth=0")

        grown = make_study(budget=24)
        place = [point.trial for point in grown.front].index(trial)
        assert place > index, "a plan entered the front below the chosen one"
        page.wait_for_selector("#live-message:has-text('24 plans')")
        page.wait_for_function("document.querySelectorAll('[data-plan]:not([hidden])').length === 1")
        assert get_shown_plans(page) == [place]
        assert page.get_attribute(f"#plan-{place}", "data-trial") == str(trial)
        assert page.inner_text(f"#plan-{place} code >> nth=0") == before


@on_the_tiny_model
def test_a_page_that_is_loaded_again_takes_plotly_from_the_browser(open_page: Any, served: dict[str, Any]) -> None:
    page = open_page(**served).page
    with page.expect_response("**/plotly.js") as asked:
        page.reload()
    sizes = asked.value.request.sizes()
    assert sizes["responseBodySize"] < 1000
    page.wait_for_selector("#chart-front .main-svg")
    assert count_drawn(page, "front") > 0


def test_a_page_of_a_study_that_cannot_be_read_comes_back(browser: Any, make_study: MakeStudy, tmp_path: Path) -> None:
    """Not by ``open_page``: a browser complains of an answer that is no success."""
    make_study(budget=6)
    with serve(tmp_path) as url:
        aside = tmp_path / "aside"
        aside.mkdir()
        for path in [*tmp_path.glob("study.db*"), tmp_path / "front.json"]:
            path.rename(aside / path.name)
        page = open_in_browser(browser, url, out=tmp_path, front=[], until="#live[data-state='lost']").page
        assert "study.db" in page.inner_text("#live")
        assert "cannot be read now" in page.inner_text("main")
        with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
            store.save_settings({"num_layers": 10, "max_group": 2, "metric": "nll", "objective": "depth"})
        with hold_study(tmp_path):
            page.wait_for_selector("#live[data-state='waiting']")
            assert "is finished yet" in page.inner_text("main")
        make_study(budget=6)
        page.wait_for_selector("#chart-front .main-svg")
        page.wait_for_selector("#live[data-state='done']")
        page.context.close()


def test_a_page_that_waits_shows_the_first_plans(open_page: Any, make_study: MakeStudy, tmp_path: Path) -> None:
    with StudyStore(f"sqlite:///{tmp_path / 'study.db'}", study_name="demo") as store:
        store.save_settings({"num_layers": 10, "max_group": 2, "metric": "nll", "objective": "depth"})
    with serve(tmp_path) as url:
        with hold_study(tmp_path):
            page = open_page(url, out=tmp_path, front=[], until="#live").page
            assert "waiting for the first plan" in page.inner_text("#live")
            assert "is finished yet" in page.inner_text("main")
        make_study(budget=12)
        page.wait_for_selector("#chart-front .main-svg")
        page.wait_for_selector("#live[data-state='done']")


def test_a_page_whose_dashboard_ended_says_so_and_goes_on(browser: Any, make_study: MakeStudy, tmp_path: Path) -> None:
    """Not by ``open_page``: a browser complains of a server that does not answer."""
    from lpsearch.commands.studies import open_existing_study
    from lpsearch_dashboard import build_server

    make_study(budget=12)
    with serve(tmp_path) as url:
        page = open_in_browser(browser, url, out=tmp_path, front=[]).page
    page.wait_for_selector("#live[data-state='lost']")
    assert "does not answer" in page.inner_text("#live")
    import threading

    port = int(url.rstrip("/").rpartition(":")[2])
    with open_existing_study(tmp_path, storage=None, study=None) as store:
        server = build_server(store, tmp_path, port=port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        page.wait_for_selector("#live[data-state='done']")
        page.context.close()
        server.shutdown()
        thread.join()
        server.server_close()
