"""The report in a real browser: it draws, answers hover, click and keys, and asks for nothing outside its file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]

CHARTS = ("front", "layers", "effects", "interactions", "progress", "fit", "breakdown")


@dataclass
class Opened:
    """A report in a browser, and what the browser said about it."""

    page: Any
    front: list[dict[str, Any]]
    out: Path
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(
    scope="module",
    params=["tiny", pytest.param("smollm2-135m", marks=[pytest.mark.packaged, pytest.mark.slow])],
)
def study(
    request: pytest.FixtureRequest, tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Search a model that really runs, with its latency measured here."""
    out = tmp_path_factory.mktemp("study") / "of a model"
    if request.param == "tiny":
        options = ["--model", tiny_model_dir, "--budget", 13]
    else:
        options = ["--model", request.param, "--budget", 14, "--freeze", "0-20"]
    command = [
        *(sys.executable, "-m", "lpsearch", "optimize", *options, "--data", text_file, "--out", out),
        *("--windows", 3, "--seq-len", 24, "--dtype", "float32", "--device", "cpu", "--quiet"),
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])["front"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_report(browser: Any, study: tuple[Path, list[dict[str, Any]]]) -> Iterator[Any]:
    """Return a function that opens the report; at the end, complaints and requests are looked at."""
    out, front = study
    contexts, everything = [], []

    def open_page(*, width: int = 1400, scheme: str = "light", **options: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        opened = Opened(context.new_page(), front, out)
        opened.page.on("console", lambda message: opened.complaints.append(message.text))
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.on("request", lambda sent: opened.requests.append(sent.url))
        opened.page.goto((out / "report.html").as_uri())
        opened.page.wait_for_selector(".plot .main-svg")
        contexts.append(context)
        everything.append(opened)
        return opened

    yield open_page
    for opened in everything:
        assert opened.complaints == []
        assert opened.requests == [(out / "report.html").as_uri()]
    for context in contexts:
        context.close()


def find_point(page: Any, index: int) -> tuple[float, float]:
    """Return where on the screen a plan of the front is drawn."""
    place = page.evaluate(
        """(index) => {
            const plot = document.getElementById("chart-front");
            plot.scrollIntoView({ block: "center" });
            const trace = plot.data.findIndex((one) => one.name === "front");
            const place = [...plot.data[trace].customdata].indexOf(index);
            const points = plot.querySelectorAll(".scatterlayer .trace");
            const box = points[trace].querySelectorAll(".points path")[place].getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }""",
        index,
    )
    return float(place[0]), float(place[1])


def point_at(page: Any, index: int) -> None:
    """Move the mouse to a plan of the front as a hand does, until its label shows."""
    page.mouse.move(5, 5)
    page.wait_for_selector("#chart-front .hoverlayer .hovertext", state="detached")
    x, y = find_point(page, index)
    page.mouse.move(x - 3, y + 3)
    page.mouse.move(x, y, steps=4)
    page.wait_for_selector("#chart-front .hoverlayer .hovertext")
    page.wait_for_timeout(100)  # plotly looks at the mouse every 50 ms


def get_shown_plans(page: Any) -> list[int]:
    shown = page.evaluate("[...document.querySelectorAll('[data-plan]')].filter((x) => !x.hidden).map((x) => x.id)")
    return [int(name.removeprefix("plan-")) for name in shown]


def join_groups(opened: Opened, index: int) -> str:
    plan = json.loads((opened.out / opened.front[index]["plan"]).read_text(encoding="utf-8"))
    return " ".join(f"{group[0]}-{group[-1]}" for group in plan["groups"] if len(group) > 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 900, 1400])
def test_every_figure_is_drawn_at_every_width(open_report: Any, width: int, scheme: str) -> None:
    page = open_report(width=width, scheme=scheme).page
    for name in CHARTS:
        drawn = page.evaluate(
            """(name) => document.querySelectorAll(
                ["path.point", ".points path", "path.js-line", ".heatmaplayer image", ".bars path"]
                    .map((one) => `#chart-${name} ${one}`).join(",")).length""",
            name,
        )
        assert drawn > 0, name
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out of the page"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    paper = page.evaluate("document.getElementById('chart-front').layout.paper_bgcolor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    assert paper == {"light": "#ffffff", "dark": "#14181d"}[scheme]


def test_hover_names_the_groups(open_report: Any) -> None:
    opened = open_report()
    opened.page.check("#all-losses")
    index = len(opened.front) - 1
    point_at(opened.page, index)
    label = opened.page.text_content("#chart-front .hoverlayer .hovertext")
    for group in join_groups(opened, index).split():
        assert group in label


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


def test_the_toggle_changes_colours_and_is_kept(open_report: Any) -> None:
    page = open_report().page
    page.click("#theme")
    assert page.evaluate("document.getElementById('chart-front').layout.paper_bgcolor") == "#14181d"
    page.click("#theme")
    assert page.evaluate("document.getElementById('chart-front').layout.paper_bgcolor") == "#ffffff"


def test_copy_puts_a_command_on_the_clipboard(open_report: Any) -> None:
    page = open_report(permissions=["clipboard-read", "clipboard-write"]).page
    button = page.locator("#front .copy:visible").first
    line = button.locator("xpath=..").locator("code").text_content()
    button.click()
    page.locator(".copy", has_text="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == line
