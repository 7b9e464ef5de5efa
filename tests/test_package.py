"""What the package promises as a whole: its names, its layering, and an import that stays light."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lpsearch

ROOT = Path(__file__).parents[1]


def test_public_names_are_pinned() -> None:
    assert lpsearch.__all__ == [
        "Plan",
        "applied_plan",
        "apply_plan",
        "apply_recovery",
        "export_checkpoint",
        "fuse_plan",
        "load_plan",
        "run_study",
        "save_plan",
        "undo_plan",
    ]
    assert lpsearch.__all__ == dir(lpsearch)
    for name in lpsearch.__all__:
        assert callable(getattr(lpsearch, name))
    modules = {path.stem for path in (ROOT / "lpsearch").iterdir()}
    assert modules.isdisjoint(lpsearch.__all__), "an exported name shadows a module"


def test_import_loads_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, lpsearch, lpsearch.plan, lpsearch.config, lpsearch.commands.app; "
        "loaded = {'torch', 'optuna', 'transformers'} & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_layering() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_tests_and_the_processes_that_they_start_take_one_thread() -> None:
    """However pytest is called: with more, ranks over gloo starve one another on busy cores."""
    code = """
import subprocess, sys
import tests.conftest
import torch

child = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
print(torch.get_num_threads(), int(subprocess.run(child, capture_output=True, text=True, check=True).stdout))
"""
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
