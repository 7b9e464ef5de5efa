"""The pictures of the README show what the studies hold, and the same study gives the same bytes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lpsearch.errors import UsageError
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, evaluate_stored_plan, run_study
from studies import readme_figures
from tests.search.evaluators import SyntheticEvaluator
from tests.tolerances import FLOAT64_COSTS

NUM_LAYERS = 8


def run_tiny_study(directory: Path, *, sampler: str, budget: int, data: str = "a.txt") -> Path:
    """Run a study of a formula, with held-out losses of every plan."""
    directory.mkdir()
    with StudyStore(f"sqlite:///{directory / 'study.db'}", study_name="tiny") as store:
        store.save_settings({"model": "m", "data": data, "windows": 8, "seq_len": 64})
        result = run_study(
            evaluator=SyntheticEvaluator(NUM_LAYERS, num_windows=8),
            space=PlanSpace(NUM_LAYERS),
            budget=budget,
            store=store,
            sampler=sampler,
            staged=False,
        )
        unseen = SyntheticEvaluator(NUM_LAYERS, num_windows=5)
        for record in result.front:
            evaluate_stored_plan(store, unseen, record.plan, split="heldout")
    return directory


def find_best_block(num_joins: int) -> float:
    """Return the least loss of a contiguous run of pairs, by trying all."""
    evaluator = SyntheticEvaluator(NUM_LAYERS, num_windows=8)
    base = evaluator.evaluate_windows(Plan.baseline(NUM_LAYERS), range(8)).nll_nats_per_token
    losses = []
    for first in range(NUM_LAYERS - 2 * num_joins + 1):
        plan = Plan.from_joins(NUM_LAYERS, range(first, first + 2 * num_joins, 2))
        values = evaluator.evaluate_windows(plan, range(8)).nll_nats_per_token
        losses.append(sum(value - other for value, other in zip(values, base, strict=True)) / 8)
    return min(losses)


def test_the_picture_of_a_group_is_the_one_checked_in() -> None:
    path = readme_figures.IMAGES / "group.svg"
    assert path.read_text(encoding="utf-8") == readme_figures.draw_group()
    words = "".join(ElementTree.parse(path).getroot().itertext())
    for name in ("attention k", "attention k+1", "MLP k", "MLP k+1"):
        assert words.count(name) >= 2


@pytest.mark.parametrize("name", ["front.svg", "group.svg"])
def test_pictures_are_small_and_fetch_nothing(name: str) -> None:
    path = readme_figures.IMAGES / name
    assert path.stat().st_size < 150_000
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?:href|src)=\"(?!#)[^\"]*\"|url\((?!#)[^)]*\)|@import", text)


def test_the_front_is_that_of_the_study_beside_the_best_blocks(tmp_path: Path) -> None:
    study = readme_figures.read_study(run_tiny_study(tmp_path / "a", sampler="pairset", budget=16))
    block_study = readme_figures.read_study(run_tiny_study(tmp_path / "b", sampler="window", budget=14))
    readme_figures.check_comparable(study, block_study)
    rows = readme_figures.collect_front([study, block_study], max_joins=3)
    assert [row["num_joins"] for row in rows] == [0, 1, 2, 3]
    for row, point in zip(rows, study.front, strict=False):
        assert row["depth_reduction"] == row["num_joins"] / NUM_LAYERS
        assert row["delta_nll"] == point.loss.delta_nll
        assert point.heldout is not None
        assert row["heldout_delta_nll"] == point.heldout.delta_nll
        if row["num_joins"] in (1, 2):  # 7 and 5 blocks; 13 plans do not hold all blocks of 3 joins
            assert row["block_heldout_delta_nll"] is not None
            assert row["block_delta_nll"] == pytest.approx(find_best_block(row["num_joins"]), abs=FLOAT64_COSTS)
    assert rows[0]["block_delta_nll"] is None
    assert rows[3]["block_delta_nll"] is None
    assert max(record.num_joins for record in block_study.blocks) == 3
    # The search evaluates every single join itself, and the only plan of four joins.
    assert sorted(readme_figures.find_best_blocks([study])) == [1, 4]


def test_studies_of_other_data_are_not_drawn_together(tmp_path: Path) -> None:
    study = readme_figures.read_study(run_tiny_study(tmp_path / "a", sampler="pairset", budget=3))
    other = readme_figures.read_study(run_tiny_study(tmp_path / "b", sampler="window", budget=3, data="b.txt"))
    with pytest.raises(UsageError, match=r"data is 'a\.txt' and 'b\.txt'"):
        readme_figures.check_comparable(study, other)


def test_a_directory_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no study\.db"):
        readme_figures.read_study(tmp_path)


def test_the_same_study_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra docs is not installed")
    study = run_tiny_study(tmp_path / "a", sampler="pairset", budget=14)
    blocks = run_tiny_study(tmp_path / "b", sampler="window", budget=10)
    pictures = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        arguments = [str(study), "--blocks", str(blocks), "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["readme_figures.py", *arguments])
        readme_figures.main()
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(summary["front"]) >= 4
        pictures.append((tmp_path / name / "front.svg").read_bytes())
    assert pictures[0] == pictures[1]
    # The picture is not empty: it has a marker for every plan and series.
    root = ElementTree.fromstring(pictures[0])
    words = "".join(root.itertext())
    assert "held out" in words
    assert "best block" in words
    assert len(re.findall(rb"<use ", pictures[0])) >= 3 * (len(summary["front"]) - 1)
