"""Text of several kinds from the command line to the last line, on a tiny model that really runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpsearch.plan import load_plan
from lpsearch.search import StudyStore
from tests.commands.conftest import Run
from tests.tolerances import FLOAT64_MEAN, LOSS_AGAIN

KIND_FIELDS = {"data", "weight", "nll", "delta_nll", "delta_nll_se", "perplexity", "windows", "num_tokens"}


@pytest.fixture
def arguments(tiny_model_dir: Path, text_file: Path, code_file: Path, tmp_path: Path) -> list[object]:
    """Return a search of the tiny model's 13 plans on two kinds of text."""
    return [
        *("optimize", "--model", tiny_model_dir, "--data", f"{text_file}@3", "--data", code_file),
        *("--windows", 3, "--seq-len", 24, "--latency", "off", "--dtype", "float32", "--device", "cpu"),
        *("--out", tmp_path / "study", "--budget", 8),
    ]


def check_kinds(point: dict, files: list[Path], prefix: str = "") -> None:
    """Every loss is known by kind, and the loss of both is their weighted mean."""
    first, second = point[f"{prefix}by_kind"]
    assert first.keys() >= KIND_FIELDS
    assert [first["data"], second["data"]] == [str(file) for file in files]
    assert [first["weight"], second["weight"]] == [3.0, 1.0]
    assert first["windows"] == second["windows"] == 3
    mean = 0.75 * first["delta_nll"] + 0.25 * second["delta_nll"]
    assert point[f"{prefix}delta_nll"] == pytest.approx(mean, abs=FLOAT64_MEAN)


def test_every_loss_is_known_by_kind(
    run_lpsearch: Run, arguments: list, tmp_path: Path, text_file: Path, code_file: Path
) -> None:
    outcome = run_lpsearch(*arguments)
    assert outcome.exit_code == 0, outcome.stderr
    front_file = json.loads((tmp_path / "study" / "front.json").read_text(encoding="utf-8"))
    assert front_file["worst_case"] is False
    assert len(front_file["front"]) > 1
    for line, point in zip(outcome.document["front"], front_file["front"], strict=True):
        for prefix in ("", "heldout_"):
            check_kinds(point, [text_file, code_file], prefix)
            assert line[f"{prefix}by_kind"] == point[f"{prefix}by_kind"]
        assert "worst_kind_loss" not in line
        metrics = load_plan(tmp_path / "study" / point["plan"]).metadata.metrics
        for measured, prefix in ((metrics.proxy, ""), (metrics.heldout, "heldout_")):
            assert measured.model_dump(mode="json")["by_kind"] == point[f"{prefix}by_kind"]
            assert measured.data == f"{text_file}@3 + {code_file}"
            assert (measured.windows, measured.num_tokens) == (6, 6 * 23)
    assert "code.txt" in outcome.stderr
    report = (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    assert "Loss by kind of text" in report


def test_the_same_mixture_resumes_and_another_is_refused(
    run_lpsearch: Run, arguments: list, text_file: Path, code_file: Path
) -> None:
    first = run_lpsearch(*arguments)
    assert run_lpsearch(*arguments).document == first.document
    at = arguments.index("--data")
    without = [*arguments[:at], *arguments[at + 4 :]]
    assert run_lpsearch(*without).document == first.document, "the record says which text"
    same = run_lpsearch(*without, "--data", code_file, "--data", f"{text_file}@3.0")
    assert same.document == first.document, "the order of kinds means nothing"
    for changed in (
        ["--data", text_file, "--data", code_file],
        ["--data", f"{text_file}@3"],
        [*arguments[at : at + 4], "--data", "self"],
        ["--worst-case"],
        ["--heldout", code_file],
    ):
        refused = run_lpsearch(*without, *changed)
        assert refused.exit_code == 2, changed
        assert changed[0] in refused.stderr
        assert "was" in refused.stderr
        assert "now" in refused.stderr


def test_the_worst_case_is_searched_and_picked(run_lpsearch: Run, arguments: list, tmp_path: Path) -> None:
    document = run_lpsearch(*arguments, "--worst-case").document
    assert len(document["front"]) > 1
    for point in document["front"]:
        for prefix in ("", "heldout_"):
            worst = max(part["delta_nll"] for part in point[f"{prefix}by_kind"])
            assert point[f"{prefix}worst_kind_loss"] == worst
    limit = min(point["heldout_worst_kind_loss"] for point in document["front"][1:])
    picked = run_lpsearch("plan", "pick", tmp_path / "study", "--max-delta", limit)
    assert picked.document["heldout_worst_kind_loss"] == limit
    assert json.loads((tmp_path / "study" / "front.json").read_text(encoding="utf-8"))["worst_case"] is True
    resumed = run_lpsearch(*arguments)
    assert resumed.document == document, "the record says how plans are compared"


@pytest.mark.parametrize("split", ["proxy", "heldout"])
def test_evaluate_repeats_the_losses_by_kind(
    run_lpsearch: Run, arguments: list, tmp_path: Path, text_file: Path, code_file: Path, split: str
) -> None:
    point = run_lpsearch(*arguments).document["front"][-1]
    plan = tmp_path / "study" / point["plan"]
    prefix = "" if split == "proxy" else "heldout_"
    again = run_lpsearch("evaluate", plan, "--split", split, "--device", "cpu")
    assert again.exit_code == 0, again.stderr
    check_kinds(again.document, [text_file, code_file])
    for found, expected in zip(again.document["by_kind"], point[f"{prefix}by_kind"], strict=True):
        assert found["delta_nll"] == pytest.approx(expected["delta_nll"], abs=LOSS_AGAIN)
    one = run_lpsearch("evaluate", plan, "--split", split, "--device", "cpu", "--data", code_file)
    assert one.document["by_kind"] == []
    expected = point[f"{prefix}by_kind"][1]["delta_nll"]
    assert one.document["delta_nll"] == pytest.approx(expected, abs=LOSS_AGAIN)


def test_held_out_text_has_kinds_of_its_own(run_lpsearch: Run, arguments: list, code_file: Path) -> None:
    outcome = run_lpsearch(*arguments, "--heldout", code_file, "--worst-case")
    assert outcome.exit_code == 0, outcome.stderr
    for point in outcome.document["front"]:
        assert (len(point["by_kind"]), point["heldout_by_kind"]) == (2, [])
        assert point["heldout_worst_kind_loss"] == point["heldout_delta_nll"], "one kind is its own worst"


def test_the_worst_of_one_kind_is_a_mistake_that_is_said(
    run_lpsearch: Run, arguments: list, text_file: Path, code_file: Path
) -> None:
    at = arguments.index("--data")
    outcome = run_lpsearch(*arguments[:at], "--data", text_file, *arguments[at + 4 :], "--worst-case", "--budget", 2)
    assert "--worst-case changes nothing" in outcome.stderr
    assert "worst_kind_loss" not in outcome.document["front"][0]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["{text}@0"], "the weight of"),
        (["{text}@-2"], "the weight of"),
        (["{text}", "{text}@2"], "named 2 times"),
        (["{text}", "/no/such/file.txt@2"], "/no/such/file.txt: no such file"),
        (["{text}", ""], "--data"),
    ],
)
def test_kinds_that_cannot_be_used_are_refused_before_anything_is_written(
    run_lpsearch: Run, tiny_model_dir: Path, text_file: Path, tmp_path: Path, specs: list[str], message: str
) -> None:
    data = [word for spec in specs for word in ("--data", spec.format(text=text_file))]
    outcome = run_lpsearch("optimize", "--model", tiny_model_dir, "--out", tmp_path / "study", *data)
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert not (tmp_path / "study" / "front.json").exists()


def test_a_study_of_one_kind_is_recorded_as_it_always_was(
    run_lpsearch: Run, arguments: list, tmp_path: Path, text_file: Path
) -> None:
    at = arguments.index("--data")
    single = [*arguments[:at], "--data", text_file, *arguments[at + 4 :]]
    document = run_lpsearch(*single).document
    assert all("by_kind" not in point for point in document["front"])
    with StudyStore(f"sqlite:///{tmp_path / 'study' / 'study.db'}", study_name=document["study"]) as store:
        settings = store.load_settings()
        assert (settings["data"], settings["heldout"]) == (str(text_file), None)
        assert "kinds" not in settings
        assert store.load_windows("proxy").spec == str(text_file)
        # As a study that knew no kinds recorded it.
        del settings["worst_case"]
        store.save_settings(settings)
    assert run_lpsearch(*single).document == document
    refused = run_lpsearch(*single, "--worst-case")
    assert refused.exit_code == 2
    assert "--worst-case was false, now true" in refused.stderr
