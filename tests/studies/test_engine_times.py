"""``studies/engine_times.py``: an engine that fails takes nothing with it, and ratios are those of rounds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from studies import engine_times
from studies.engine_times import compare_rounds, run_apart

TINY = ["--shape", "tiny", "--layers", "4", "--plans", "2", "--context", "8", "--seconds", "0.1"]


def test_ratios_are_those_of_rounds() -> None:
    load = np.random.default_rng(0).uniform(1, 5, size=200)  # of the machine, the same for both in a round
    ratio, low, high = compare_rounds(6 * load, 5 * load)
    assert ratio == pytest.approx(1.2)
    assert high - low < 1e-9


@pytest.mark.slow
def test_an_engine_that_crashes_or_hangs_is_left_out() -> None:
    assert "ended with exit code 1" in run_apart("runtime", [*TINY, "--dtype", "nonsense"], limit_s=300)["left_out"]
    assert run_apart("runtime", TINY, limit_s=0.01) == {"left_out": "it did not end within 0.01 s"}


@pytest.mark.slow
def test_the_other_engine_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [engine_times.__file__, *TINY, "--batch", "2", "--engines", "llama.cpp,runtime"])
    engine_times.main()
    stdout = capsys.readouterr().out
    found = json.loads(stdout.splitlines()[-1])
    assert list(found["left_out"]) == ["llama.cpp"]
    (engine,) = found["engines"]
    assert [row["depth"] for row in engine["rows"]] == [4, 3, 3]  # the copy, then the plans
    assert engine["rows"][0]["predicted"] == 1
    assert all(row["measured"] > 0 and row["num_blocks"] >= 30 for row in engine["rows"])
    assert "runtime       differs by at most" in stdout
