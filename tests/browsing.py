"""Looking at pages in a real browser: opening them, finding points of figures, pointing at them as a hand does."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

REAL_MODEL = pytest.param("smollm2-135m", marks=[pytest.mark.packaged, pytest.mark.slow])
STUDIED_MODELS = ("tiny", REAL_MODEL)
"""Models of ``searched_study``. What its size changes is tried on both: figures, and what must fit on a page."""

CHARTS = ("front", "layers", "effects", "interactions", "progress", "fit", "breakdown")


# The page of a dashboard asks for news every two seconds; here, five times a second. (Routing the script would switch
# off the cache of the browser.)
_POLL_OFTEN = """{
    const wait = window.setTimeout;
    window.setTimeout = (call, ms, ...rest) => wait(call, ms === 2000 ? 200 : ms, ...rest);
}"""

on_the_tiny_model = pytest.mark.parametrize("searched_study", ["tiny"], indirect=True, scope="session")


@dataclass
class Opened:
    """A page of a study in a browser, and what the browser said about it."""

    page: Any
    front: list[dict[str, Any]]
    out: Path
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def open_in_browser(
    browser: Any,
    url: str,
    *,
    out: Path,
    front: list[dict[str, Any]],
    width: int = 1400,
    scheme: str = "light",
    until: str = ".plot .main-svg",
    **options: Any,
) -> Opened:
    """Open a page of a study, wait for an element, and note from the start what goes wrong and what is asked for."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
    context.add_init_script(_POLL_OFTEN)
    opened = Opened(context.new_page(), front, out)
    opened.page.on("console", lambda message: opened.complaints.append(message.text))
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.on("request", lambda sent: opened.requests.append(sent.url))
    opened.page.goto(url)
    opened.page.wait_for_selector(until)
    return opened


def count_drawn(page: Any, name: str) -> int:
    """Count the points, lines, bars and maps that a figure has drawn."""
    return int(
        page.evaluate(
            """(name) => document.querySelectorAll(
                ["path.point", ".points path", "path.js-line", ".heatmaplayer image", ".bars path"]
                    .map((one) => `#chart-${name} ${one}`).join(",")).length""",
            name,
        )
    )


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
    """Return the places on the front of the plans that are shown; one, if all is well."""
    shown = page.evaluate("[...document.querySelectorAll('[data-plan]')].filter((x) => !x.hidden).map((x) => x.id)")
    return [int(name.removeprefix("plan-")) for name in shown]


def join_groups(opened: Opened, index: int) -> str:
    """Write the groups of a front plan's file as a page does."""
    plan = json.loads((opened.out / opened.front[index]["plan"]).read_text(encoding="utf-8"))
    return " ".join(f"{group[0]}-{group[-1]}" for group in plan["groups"] if len(group) > 1)
