"""The audit of the pinned dependencies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PINS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def run_audit(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / ".ci" / "audit.py", "--skip-installed", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def test_the_pins_of_this_project_pass() -> None:
    done = run_audit()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("0 findings")


@pytest.mark.parametrize(
    ("changed", "finding"),
    [
        (("torch==", "torch==2.5.1 #"), "torch==2.5.1: CVE-2025-32434"),
        (("torch==", "torch>="), "not pinned to one version; write torch==VERSION"),
        (("torch==", "other==1 #"), "torch>=2.13: has no pin"),
        (("torch==", "torch==2.6.0 #"), "torch>=2.13: constraints.txt pins 2.6.0"),
        (("torch==", "torch @ https://example.org/torch.whl #"), "not pinned to one version"),
        (("numpy==", "numpy==2.4.6\nnumpy=="), "numpy is pinned twice"),
        (("numpy==", "no requirement at all =="), "no requirement"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changed: tuple[str, str], finding: str) -> None:
    file = tmp_path / "constraints.txt"
    before, after = changed
    file.write_text(PINS.replace(f"\n{before}", f"\n{after}"), encoding="utf-8")
    done = run_audit("--constraints", file)
    assert done.returncode == 1
    assert finding in done.stderr
