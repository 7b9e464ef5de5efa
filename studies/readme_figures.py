"""Draw the pictures of the README and the documentation as SVG: the front of a study, and a group of layers.

    lpsearch optimize --model M --data TEXT --windows W --seq-len T --budget 100 --out A
    lpsearch optimize --model M --data TEXT --windows W --seq-len T --sampler window --budget 226 --latency off --out B
    python studies/readme_figures.py A --blocks B

The same study gives the same bytes. The last line is JSON: the files and the numbers drawn. The front needs matplotlib
(the extra ``docs``). Without a study the script draws the group alone, which needs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lpsearch.commands.studies import open_existing_study
from lpsearch.errors import LpsearchError, UsageError
from lpsearch.report import StudyReport, load_report
from lpsearch.search import PlanSpace, TrialResult

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SHARED_SETTINGS = ("num_layers", "data", "heldout", "windows", "seq_len", "dtype", "metric", "max_group")
"""Two studies must agree in these, and in the loss of the unmodified model, for their losses to be comparable."""

INK, PAPER, FAINT = "#1f2937", "#ffffff", "#6b7280"
ATTENTION, MLP = ("#dbe7fb", "#2f62b5"), ("#fde6cf", "#b75e12")
"""The colours of the fill and of the line."""


def main() -> int:
    """Draw the pictures, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="study whose front is drawn")
    parser.add_argument("--blocks", type=Path, help="study of `--sampler window` on the same data: the blocks")
    parser.add_argument("--max-joins", type=int, default=10, help="most joins of a plan that is drawn")
    parser.add_argument("--out", type=Path, default=IMAGES, help="directory of the pictures")
    arguments = parser.parse_args()
    try:
        print(json.dumps(draw(arguments)))
    except LpsearchError as error:
        print(f"readme_figures: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw the group, and the front if there is a study. Return the files and the numbers drawn."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"files": [str(arguments.out / "group.svg")]}
    (arguments.out / "group.svg").write_text(draw_group(), encoding="utf-8")
    if arguments.directory is not None:
        study = read_study(arguments.directory)
        studies = [study]
        if arguments.blocks is not None:
            studies.append(read_study(arguments.blocks))
            check_comparable(*studies)
        front = collect_front(studies, max_joins=arguments.max_joins)
        path = arguments.out / "front.svg"
        draw_front(front, study, path)
        summary |= {"baseline_nll": study.baseline.loss.nll, "front": front}
        summary["files"].append(str(path))
    return summary


def read_study(directory: Path) -> StudyReport:
    """Read a study as the report does.

    Raises:
        UsageError: if there is none.
    """
    with open_existing_study(directory, storage=None, study=None) as store:
        return load_report(store, directory)


def check_comparable(study: StudyReport, other: StudyReport) -> None:
    """Refuse two studies whose losses are not comparable.

    Raises:
        UsageError: with the differences.
    """
    found = [
        f"{name} is {study.settings.get(name)!r} and {other.settings.get(name)!r}"
        for name in SHARED_SETTINGS
        if study.settings.get(name) != other.settings.get(name)
    ]
    if study.baseline.loss.nll != other.baseline.loss.nll:
        found.append(f"the unmodified model's loss is {study.baseline.loss.nll} and {other.baseline.loss.nll}")
    if found:
        raise UsageError(f"{study.directory} and {other.directory} are not comparable: {'; '.join(found)}")


def find_best_blocks(studies: Sequence[StudyReport]) -> dict[int, TrialResult]:
    """Return the block of least loss for each number of joins, where the studies evaluated every such block.

    A block is a contiguous run of pairs, the plan of the published method.

    Args:
        studies: on the same data; a block counts if any of them evaluated it.
    """
    settings, num_layers = studies[0].settings, studies[0].num_layers
    space = PlanSpace(num_layers, int(settings["max_group"]), tuple(settings.get("freeze", ())))
    runs = [range(first, stop) for first in range(num_layers) for stop in range(first + 1, num_layers)]
    blocks = {space.repair(run) for run in runs} - {()}
    tried = [record for study in studies for record in study.results if record.plan.joins in blocks]
    missing = {len(joins) for joins in blocks - {record.plan.joins for record in tried}}
    best: dict[int, TrialResult] = {}
    for record in sorted(tried, key=lambda record: record.get_cost(studies[0].metric)):
        if record.state == "complete" and record.num_joins not in missing:
            best.setdefault(record.num_joins, record)
    return best


def collect_front(studies: Sequence[StudyReport], *, max_joins: int) -> list[dict[str, Any]]:
    """Return the numbers to draw: one entry for each plan of the first study's front, None for what is not known.

    Args:
        studies: the search, and others on the same data that evaluated blocks.
        max_joins: most joins of a plan that is drawn.
    """
    metric = studies[0].metric
    best_blocks = find_best_blocks(studies)
    heldout = {record.plan: record.get_heldout(metric) for study in studies for record in study.front}
    rows = []
    for record in studies[0].front:
        if record.num_joins > max_joins:
            continue
        row: dict[str, Any] = {"num_joins": record.num_joins, "depth_reduction": record.depth_reduction}
        for prefix, plan_record in (("", record), ("block_", best_blocks.get(record.num_joins))):
            checked = heldout.get(plan_record.plan) if plan_record else None
            row |= {
                f"{prefix}delta_nll": plan_record.get_cost(metric) if plan_record else None,
                f"{prefix}delta_nll_se": (plan_record.get_cost_se(metric) or 0.0) if plan_record else None,
                f"{prefix}heldout_delta_nll": checked.get_cost(metric) if checked else None,
                f"{prefix}heldout_delta_nll_se": (checked.get_cost_se(metric) or 0.0) if checked else None,
            }
        rows.append(row)
    return rows


def draw_front(rows: Sequence[dict[str, Any]], study: StudyReport, path: Path) -> None:
    """Draw added loss against depth reduction."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    style = {
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.family": ["DejaVu Sans", "sans-serif"],
        "font.size": 13,
        "svg.fonttype": "none",  # text stays text: small, and readable by screen readers
        "svg.hashsalt": "lpsearch",
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    series = [
        ("block_heldout_delta_nll", "best block (published method), held out", FAINT, "s", "--"),
        ("heldout_delta_nll", "found by lpsearch, held out", ATTENTION[1], "o", "-"),
        ("delta_nll", "the same plans on the text that was searched", MLP[1], "D", "none"),
    ]
    with mpl.rc_context(style):
        figure, axes = plt.subplots(figsize=(7.4, 4.5), facecolor=PAPER, layout="constrained")
        for name, label, colour, marker, line in series:
            known = [row for row in rows if row[name] is not None]
            if known:
                axes.errorbar(
                    [100 * row["depth_reduction"] for row in known],
                    [row[name] for row in known],
                    yerr=[row[f"{name}_se"] for row in known],
                    label=label,
                    color=colour,
                    marker=marker,
                    markersize=7 if line != "none" else 6,
                    markerfacecolor=colour if line != "none" else PAPER,
                    linestyle=line,
                    linewidth=1.8,
                    elinewidth=1.2,
                    capsize=3,
                )
        axes.set_xlabel("depth reduction (%)")
        axes.set_ylabel("added loss (nats per token)")
        axes.set_ylim(bottom=-0.03)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="upper left")
        axes.set_title(describe(study), fontsize=11, loc="left", color=FAINT)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None}, facecolor=PAPER)
        plt.close(figure)
    # Matplotlib ends some lines with a space.
    text = "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())
    path.write_text(text + "\n", encoding="utf-8")


def describe(study: StudyReport) -> str:
    """Say what was searched, and what the bars are."""
    settings = study.settings
    data = [settings["data"]] if isinstance(settings["data"], str) else settings["data"]
    text = " + ".join("text that the model wrote" if spec == "self" else spec for spec in data)
    tokens = f"{settings['windows']} x {settings['seq_len']} tokens of {text}"
    return f"{study.name}: {len(study.results)} plans, {tokens}\nbars: ± a standard error over windows"


def draw_group() -> str:
    """Draw two layers in sequence beside the same two as one group, by hand."""
    parts = [*_draw_panel(30, "Two layers in sequence", 1), *_draw_panel(400, "The same two as one group", 2)]
    lines = [
        "one sum after the attentions,",
        "one after the MLPs: half the steps,",
        "half the all-reduces, the same weights",
    ]
    parts += [_text(570, 392 + 28 * i, line, size=18, fill=FAINT) for i, line in enumerate(lines)]
    title = "Two layers in sequence beside the same two layers as one group"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 600" role="img" aria-label="' + title + '" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\">\n"
        f"<title>{title}</title>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5.5" markerHeight="5.5" '
        f'orient="auto"><path d="M0 0.5L8 4L0 7.5z" fill="{INK}"/></marker></defs>\n'
        f'<rect width="760" height="600" rx="8" fill="{PAPER}"/>\n'
        f'<path d="M372 40V560" stroke="#e5e7eb" stroke-width="2"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _draw_panel(left: int, title: str, width: int) -> Iterator[str]:
    """Draw one panel: ``width`` layers at once, of two in all."""
    stream, step, top = left + 20, 112, 84
    columns = [left + (190 if width == 1 else 122 + 152 * i) for i in range(width)]
    yield _text(left + 165, 36, title, size=21, weight=600)
    yield _text(stream, top - 12, "x", size=21, italic=True)
    num_steps = 4 // width
    for index in range(num_steps):
        y = top + step * index
        is_attention = index % 2 == 0
        name, norm, (fill, line) = ("attention", "norm", ATTENTION) if is_attention else ("MLP", "norm", MLP)
        yield _path(f"M{stream} {y}V{y + step - 20}")  # the residual stream
        yield _path(f"M{stream} {y + 6}H{columns[-1]}", head=False)
        for column, layer in zip(columns, range(index // 2, index // 2 + width), strict=True):
            label = f"{name} {'k' if layer == 0 else 'k+1'}"
            yield _path(f"M{column} {y + 6}V{y + 22}")
            yield _box(column, y + 22, 20, norm, "#f3f4f6", FAINT, size=15)
            yield _box(column, y + 46, 32, label, fill, line, size=17)
            yield _path(f"M{column} {y + 78}V{y + step - 13}", head=False)
        yield _path(f"M{columns[-1]} {y + step - 13}H{stream + 11}")
        yield f'<circle cx="{stream}" cy="{y + step - 13}" r="9" fill="{PAPER}" stroke="{INK}" stroke-width="2"/>'
        cross = f"M{stream - 5} {y + step - 13}h10M{stream} {y + step - 18}v10"
        yield _path(cross, head=False)
    end = top + step * num_steps
    yield _path(f"M{stream} {end - 4}V{end + 18}")
    yield _text(stream, end + 40, "y", size=21, italic=True)


def _text(x: float, y: float, text: str, *, size: int, weight: int = 400, italic: bool = False, fill: str = INK) -> str:
    style = ' font-style="italic" font-family="Georgia, serif"' if italic else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="middle"{style}>'
        f"{text}</text>"
    )


def _path(d: str, *, head: bool = True) -> str:
    end = ' marker-end="url(#head)"' if head else ""
    return f'<path d="{d}" fill="none" stroke="{INK}" stroke-width="2"{end}/>'


def _box(x: float, y: float, height: int, text: str, fill: str, line: str, *, size: int) -> str:
    label = _text(x, y + height / 2 + size * 0.35, text, size=size, fill=INK)
    return (
        f'<rect x="{x - 68}" y="{y}" width="136" height="{height}" rx="5" fill="{fill}" stroke="{line}" '
        f'stroke-width="1.5"/>{label}'
    )


if __name__ == "__main__":
    sys.exit(main())
