"""The page: it parses, loads nothing, stays small, and says in words what its figures show."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lpsearch.report import build_html, write_html
from tests.report.conftest import MakeStudy
from tests.report.pages import parse
from tests.search.evaluators import SyntheticEvaluator

MAX_BYTES = 6_000_000


def test_page_parses_loads_nothing_and_is_small(make_study: MakeStudy, tmp_path: Path) -> None:
    report = make_study(sampler="window", budget=34)
    path = tmp_path / "page.html"
    num_bytes = write_html(report, path)
    assert num_bytes == path.stat().st_size < MAX_BYTES
    page = parse(path.read_text(encoding="utf-8"))
    assert page.references
    for reference in page.references:
        assert reference.startswith(("#", "data:")), reference
    for style in page.styles:
        assert not re.search(r"url\(|@import|//", style)
    figures = json.loads(page.data)["figures"]
    assert set(figures) == {"front", "layers", "progress", "effects", "interactions", "fit", "breakdown"}
    assert set(figures["front"]) == {"depth delta", "depth perplexity", "latency delta", "latency perplexity"}
    assert set(figures["fit"]) == {"0", "1"}
    assert "http-equiv" in path.read_text(encoding="utf-8")[:2000]
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_every_front_plan_has_its_numbers_and_commands(make_study: MakeStudy) -> None:
    report = make_study()
    page = parse(build_html(report))
    for index, point in enumerate(report.front):
        assert f"plan-{index}" in page.ids
        assert f"lpsearch evaluate {report.directory}/{point.plan_file}" in page.text
        assert f"{point.loss.delta_nll:.4f}" in page.text
    assert "under way or was interrupted" not in page.text


def test_names_cannot_break_the_page(make_study: MakeStudy) -> None:
    report = make_study(budget=12)
    odd = "</script><b>&\"'"
    report = dataclasses.replace(
        report, name=odd, directory=odd, settings={**report.settings, "model": odd, "data": odd}
    )
    page = parse(build_html(report))
    assert page.text.count(odd) >= 3


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 1},
        {"budget": 2, "latency": False},
        {"heldout": False, "files": False, "latency": False},
        {"metric": "kl", "budget": 16},
        {"evaluator": SyntheticEvaluator(10, num_windows=1), "objective": "latency", "budget": 20},
    ],
    ids=["baseline alone", "one join", "no held-out, files or latency", "kl", "one window, by latency"],
)
def test_any_state_of_a_study_has_a_page(make_study: MakeStudy, options: dict) -> None:
    report = make_study(**options)
    page = parse(build_html(report))
    assert ("latency" in page.ids) == options.get("latency", True)
    assert ("plan file is not written" in page.text) == (not options.get("files", True))


def test_a_large_study_stays_small(make_study: MakeStudy) -> None:
    """80 layers and 3000 trials, whose records repeat those of a small study."""
    import numpy as np

    from lpsearch.plan import Plan
    from lpsearch.report.effects import ChoiceEffects
    from lpsearch.search import PlanSpace

    report = make_study(budget=12)
    rng = np.random.default_rng(0)
    base = dataclasses.replace(report.baseline, plan=Plan.baseline(80))
    records = [base]
    for trial in range(1, 3000):
        joins = 2 * np.flatnonzero(rng.random(39) < rng.uniform(0.05, 0.9))
        plan = Plan.from_joins(80, joins.tolist() or [0])
        delta = 0.02 * plan.num_joins**1.5 * float(rng.uniform(0.8, 2))
        loss = dataclasses.replace(base.loss, delta_nll=delta, nll=base.loss.nll + delta)
        records.append(dataclasses.replace(base, plan=plan, trial=trial, loss=loss))
    best = {
        k: min((r for r in records if r.num_joins == k), key=lambda r: r.loss.delta_nll)
        for k in range(40)
        if any(r.num_joins == k for r in records)
    }
    front = [dataclasses.replace(best[k], heldout=None) for k in sorted(best)]
    effects = ChoiceEffects(
        choices=PlanSpace(80).choices,
        measured=(0.1,) * 79,
        measured_se=(0.01,) * 79,
        expected=(0.1,) * 79,
        interactions=tuple(tuple(float(x) for x in row) for row in rng.normal(size=(79, 79))),
    )
    large = dataclasses.replace(report, results=tuple(records), front=tuple(front), effects=effects, latency_model=None)
    assert len(build_html(large).encode()) < MAX_BYTES


def test_reports_need_no_torch() -> None:
    code = (
        "import sys, lpsearch.report; "
        "loaded = {'torch', 'transformers'} & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
