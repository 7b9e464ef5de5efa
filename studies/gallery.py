"""Make the gallery of the documentation: search the packaged models on ordinary text, and write a page of each front.

    python studies/gallery.py --data wikitext2-valid.txt --heldout wikitext2-test.txt

The texts are WikiText-2 (Merity et al., 2016), as files or as ``wikitext2`` from the hub. A study that is there already
is resumed, so the pages alone are written again in seconds. Each page is the ``report.html`` of its study, except that
the pages share the library that draws their figures, which the build of the documentation puts beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpsearch.commands.studies import open_existing_study
from lpsearch.errors import LpsearchError
from lpsearch.report import build_html, load_report
from lpsearch.report.study import StudyReport

__all__ = ["ENTRIES", "PLOTLY_NAME", "Entry", "write_page"]

PAGES = Path(__file__).parents[1] / "docs" / "fronts"
PLOTLY_NAME = "plotly.min.js"
"""Name of the library beside the pages; ``docs/hooks.py`` adds it."""

SETTINGS = ("--windows", "4", "--seq-len", "512")
DEPTH = ("--objective", "depth", "--latency", "off")
"""Of searches over joins, where the front of depth is that of time on any machine."""

DROPS = ("--allow", "joins,drops")
"""Of searches over drops: an attention saves another time than an MLP, so they need the times of some machine."""


@dataclass(frozen=True)
class Entry:
    """A study of the gallery.

    Attributes:
        name: of the study and of its page.
        model: alias.
        budget: plans in all.
        options: what else the search is told.
    """

    name: str
    model: str
    budget: int
    options: tuple[str, ...] = ()


ENTRIES = (
    Entry("smollm2-135m-joins", "smollm2-135m", 100, DEPTH),
    Entry("smollm2-135m-drops", "smollm2-135m", 140, DROPS),
    Entry("smollm2-135m-refit", "smollm2-135m", 107, (*DROPS, "--recover", "refit")),
    Entry("gemma3-270m-joins", "gemma3-270m", 50, DEPTH),
    Entry("gemma3-270m-drops", "gemma3-270m", 90, DROPS),
)


def find_profile(entry: Entry, directory: Path) -> Path | None:
    """Return the times of this machine, measured once for a model, that a search over drops needs; None for any other.

    Raises:
        CalledProcessError: if they cannot be measured.
    """
    if entry.options[: len(DROPS)] != DROPS:
        return None
    path = directory / f"{entry.model}-latency.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lpsearch", "profile", "--model", entry.model, "--out", str(path), *DROPS]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def search(entry: Entry, directory: Path, *, data: str, heldout: str, profile: Path | None) -> None:
    """Run a study of the gallery, or resume it.

    Args:
        entry: the study.
        directory: where it is.
        data: text that is searched on.
        heldout: text that its front is checked on.
        profile: times that it trades against the loss; None where it trades depth.

    Raises:
        CalledProcessError: if the search fails; it has said why.
    """
    command = [sys.executable, "-m", "lpsearch", "optimize", "--model", entry.model, "--budget", str(entry.budget)]
    command += ["--data", data, "--heldout", heldout, "--study", entry.name, "--out", str(directory)]
    command += [] if profile is None else ["--latency", str(profile)]
    subprocess.run([*command, *SETTINGS, *entry.options], check=True, stdout=subprocess.DEVNULL)


def write_page(directory: Path, page: Path) -> StudyReport:
    """Write the page of a study, and return what it shows.

    Args:
        directory: of the study.
        page: the file to write.

    Raises:
        LpsearchError: if there is no such study.
    """
    with open_existing_study(directory, storage=None, study=None) as store:
        report = load_report(store, directory)
    report = dataclasses.replace(
        report,
        directory=f"studies/{report.name}",
        settings={**report.settings, **{name: name_file(report.settings.get(name)) for name in ("data", "heldout")}},
    )
    page.write_text(build_html(report, plotly_url=PLOTLY_NAME), encoding="utf-8")
    return report


def name_file(spec: Any) -> Any:
    """Name a text file without its place on this machine, which is nobody's business; anything else stays."""
    return Path(spec).name if isinstance(spec, str) and Path(spec).is_absolute() else spec


def main() -> int:
    """Search and write every page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="wikitext2", help="text that is searched on")
    parser.add_argument("--heldout", default="wikitext2", help="text that the fronts are checked on")
    parser.add_argument("--studies", type=Path, default=Path("studies/gallery"), help="directory of the studies")
    parser.add_argument("--out", type=Path, default=PAGES, help="directory of the pages")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pages = {}
    try:
        for entry in ENTRIES:
            directory = arguments.studies / entry.name
            profile = find_profile(entry, arguments.studies)
            search(entry, directory, data=arguments.data, heldout=arguments.heldout, profile=profile)
            page = arguments.out / f"{entry.name}.html"
            report = write_page(directory, page)
            pages[page.name] = {"plans": len(report.results), "bytes": page.stat().st_size}
            print(f"{page.name}: {len(report.results)} plans, {page.stat().st_size / 1e3:.0f} kB", file=sys.stderr)
    except LpsearchError as error:
        print(f"gallery: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        return error.returncode
    print(json.dumps({"out": str(arguments.out), "pages": pages}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
