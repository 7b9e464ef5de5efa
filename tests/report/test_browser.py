"""The report in a real browser: it draws, answers hover, click and keys, and asks for nothing outside its file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lpsearch.report import write_html
from tests.browsing import (
    CHARTS,
    Opened,
    count_drawn,
    get_shown_plans,
    join_groups,
    on_the_tiny_model,
    open_in_browser,
    point_at,
)
from tests.report.conftest import EVERYTHING, search_formula

pytestmark = pytest.mark.browser


@pytest.fixture
def open_report(browser: Any, searched_study: tuple[Path, list[dict[str, Any]]]) -> Iterator[Any]:
    """Return a function that opens the report; at the end, complaints and requests are looked at."""
    out, front = searched_study
    url = (out / "report.html").as_uri()
    everything: list[Opened] = []

    def open_page(**options: Any) -> Opened:
        everything.append(open_in_browser(browser, url, out=out, front=front, **options))
        return everything[-1]

    yield open_page
    for opened in everything:
        assert opened.complaints == []
        assert opened.requests == [url]
        opened.page.context.close()


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (900, "dark"), (1400, "light")])
def test_every_figure_is_drawn_at_every_width(open_report: Any, width: int, scheme: str) -> None:
    page = open_report(width=width, scheme=scheme).page
    for name in CHARTS:
        assert count_drawn(page, name) > 0, name
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out of the page"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    paper = page.evaluate("document.getElementById('chart-front').layout.paper_bgcolor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    assert paper == {"light": "#ffffff", "dark": "#14181d"}[scheme]


@on_the_tiny_model
def test_hover_names_the_groups(open_report: Any) -> None:
    opened = open_report()
    opened.page.check("#all-losses")
    index = len(opened.front) - 1
    point_at(opened.page, index)
    label = opened.page.text_content("#chart-front .hoverlayer .hovertext")
    for group in join_groups(opened, index).split():
        assert group in label


@on_the_tiny_model
def test_a_click_shows_the_plan_and_its_commands(open_report: Any) -> None:
    opened = open_report()
    opened.page.check("#all-losses")
    for saving in ("depth", "latency"):
        opened.page.select_option("#front select >> nth=0", saving)
        opened.page.wait_for_selector(f"#chart-front[data-drawn='{saving} delta']")
        for index in range(len(opened.front)):
            point_at(opened.page, index)
            opened.page.mouse.down()
            opened.page.mouse.up()
            opened.page.wait_for_selector(f"#plan-{index}", state="visible")
            assert get_shown_plans(opened.page) == [index]
            text = opened.page.inner_text(f"#plan-{index}")
            assert (join_groups(opened, index) or "every layer alone") in text
            lines = opened.page.eval_on_selector_all(f"#plan-{index} code", "all => all.map((one) => one.textContent)")
            assert [line.split()[:2] for line in lines] == [
                ["lpsearch", "evaluate"],
                ["lpsearch", "generate"],
                ["lpsearch", "export"],
                ["lpsearch", "generate"],
                ["vllm", "serve"],
            ]
            assert str(opened.out / opened.front[index]["plan"]) in lines[0]


@on_the_tiny_model
def test_the_layer_map_and_tables_choose_plans(open_report: Any) -> None:
    opened = open_report()
    rows = len(opened.front)
    opened.page.locator("#chart-layers").scroll_into_view_if_needed()
    box = opened.page.locator("#chart-layers .nsewdrag").bounding_box()
    opened.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * (rows - 0.5) / rows)
    opened.page.wait_for_selector(f"#plan-{rows - 1}", state="visible")
    opened.page.click("#front summary")
    opened.page.click("#front table [data-show='0']")
    assert get_shown_plans(opened.page) == [0]


def test_the_halves_of_a_map_with_drops_choose_their_plan(browser: Any, tmp_path: Path) -> None:
    report = search_formula(tmp_path, budget=45, objective="latency", allow=EVERYTHING)
    write_html(report, tmp_path / "report.html")
    opened = open_in_browser(browser, (tmp_path / "report.html").as_uri(), out=tmp_path, front=[])
    page = opened.page
    page.locator("#chart-layers").scroll_into_view_if_needed()
    box = page.locator("#chart-layers .nsewdrag").bounding_box()
    halves = [(place, half) for place in range(len(report.front)) for half in (0.25, 0.75)]
    for place, half in (*halves[::2], *halves[1::2]):  # so that every click chooses another plan than the one before
        branch = "attention" if half < 0.5 else "mlp"
        layer_idx = next(iter(report.front[place].plan.dropped[branch]), 3)  # of dropped ones, the empty cell
        across = box["x"] + box["width"] * (layer_idx + 0.2) / report.num_layers
        page.mouse.move(across, box["y"] + box["height"] * (place + half) / len(report.front))
        page.wait_for_timeout(150)  # plotly looks at where the mouse is some times a second
        page.mouse.down()
        page.mouse.up()
        page.wait_for_selector(f"#plan-{place}", state="visible")
        assert get_shown_plans(page) == [place]
    assert count_drawn(page, "layers") > sum(point.plan.num_dropped for point in report.front)
    assert opened.complaints == []
    page.context.close()


@on_the_tiny_model
def test_keys_alone_are_enough(open_report: Any) -> None:
    opened = open_report()
    page = opened.page
    reached = []
    for _ in range(400):
        page.keyboard.press("Tab")
        name = page.evaluate("(x => x.id || x.className || x.tagName)(document.activeElement)")
        if name == "BODY":
            break
        reached.append(name)
        if name == "chart-front":
            page.keyboard.press("ArrowLeft")
            first = get_shown_plans(page)
            page.keyboard.press("ArrowRight")
            assert get_shown_plans(page) == [first[0] + 1]
    assert {"skip", "theme", "chart-front", "copy", "show", "all-losses"} <= {name.split()[0] for name in reached}
    assert reached.count("SUMMARY") == len(CHARTS), "every figure has its table"


@on_the_tiny_model
def test_the_toggle_changes_colours_and_is_kept(open_report: Any) -> None:
    page = open_report().page
    page.click("#theme")
    assert page.evaluate("document.getElementById('chart-front').layout.paper_bgcolor") == "#14181d"
    page.click("#theme")
    assert page.evaluate("document.getElementById('chart-front').layout.paper_bgcolor") == "#ffffff"


@on_the_tiny_model
def test_copy_puts_a_command_on_the_clipboard(open_report: Any) -> None:
    page = open_report(permissions=["clipboard-read", "clipboard-write"]).page
    button = page.locator("#front .copy:visible").first
    line = button.locator("xpath=..").locator("code").text_content()
    button.click()
    page.locator(".copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == line
