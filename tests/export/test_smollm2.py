"""A real model: a directory gives the loss that stands in its plan file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lpsearch.data import Windows, build_windows
from lpsearch.evaluation import ModelEvaluator
from lpsearch.export import export_source
from lpsearch.models import load_model, resolve_source
from lpsearch.plan import Plan
from tests.tolerances import NLL_NATS_PER_TOKEN

PLAN = Plan.from_groups(
    [
        *([i] for i in range(10)),
        [10, 11],
        [12],
        [13, 14, 15],
        *([i] for i in range(16, 20)),
        [20, 21],
        *([i] for i in range(22, 30)),
    ]
)


@torch.no_grad()
def compute_nll(model: PreTrainedModel, windows: Windows) -> float:
    """Mean loss in nats per token, in float64 over float32 logits."""
    losses = []
    for row in torch.from_numpy(windows.input_ids.astype("int64")):
        logits = model(row[None]).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, row[1:], reduction="none").double())
    return float(torch.cat(losses).mean())


@pytest.mark.packaged
@pytest.mark.slow
def test_a_directory_gives_the_loss_of_its_plan(text_file: Path, tmp_path: Path) -> None:
    source = resolve_source("smollm2-135m")
    loaded = load_model(source, device="cpu", dtype=torch.float32)
    windows = build_windows(
        str(text_file),
        tokenizer=loaded.tokenizer,
        num_windows=2,
        seq_len=128,
        split="proxy",
        seed=0,
        model=loaded.model,
    )
    evaluator = ModelEvaluator(model=loaded.model, windows=windows, metric="nll")
    losses = evaluator.evaluate_windows(PLAN, range(2)).nll_nats_per_token
    expected = sum(losses) / len(losses)  # what stands in a plan file
    export_source(source, PLAN, tmp_path / "out")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert compute_nll(fused, windows) == pytest.approx(expected, abs=NLL_NATS_PER_TOKEN)
    assert compute_nll(loaded.model, windows) < expected - 0.1  # so that the plan matters
