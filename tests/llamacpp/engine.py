"""Stock llama.cpp, asked about a GGUF file in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

__all__ = ["NEEDS_LLAMACPP", "ask_llamacpp", "compute_log_probabilities"]

NEEDS_LLAMACPP = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs stock llama.cpp (pip install xllamacpp)"
)


def ask_llamacpp(path: Path, **questions: Any) -> dict[str, Any]:
    """Ask llama.cpp about a file; ``tests/llamacpp/serve.py`` says what may be asked."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("serve.py")), str(path)],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"llama.cpp failed on {path}: {(done.stdout + done.stderr)[-3000:]}"
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def compute_log_probabilities(path: Path, prompts: Sequence[Sequence[int]], *, vocab_size: int) -> Tensor:
    """Return the log-probabilities of the token after each prompt, (prompts, vocab), in float64."""
    answers = ask_llamacpp(path, prompts=[list(prompt) for prompt in prompts], vocab_size=vocab_size)
    rows = [[row[str(token_id)] for token_id in range(vocab_size)] for row in answers["log_probabilities"]]
    return torch.tensor(rows, dtype=torch.float64)
