"""The refit whose smallest ridge is chosen by the loss: against every choice tried by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lpsearch.data import Windows
from lpsearch.errors import DataError
from lpsearch.plan import Plan
from lpsearch.recovery import Refitter, swapped_weights
from lpsearch.recovery.by_loss import refit_by_loss, split_validation
from lpsearch.transform import applied_plan
from tests.recovery.refitting import SEQ_LEN, build_windows
from tests.tiny_models import build_tiny_model

PLAN = Plan.from_groups([[0], [1, 2], [3], [4, 5]])


@pytest.fixture
def model() -> PreTrainedModel:
    return build_tiny_model("llama")


def compute_kl(model: PreTrainedModel, weights: Any, windows: Windows) -> float:
    """KL(base || plan), nats per predicted token, from logits."""
    tokens = torch.tensor(windows.input_ids).long()
    with torch.no_grad():
        base = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        with swapped_weights(model, weights), applied_plan(model, PLAN):
            found = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    return float((base.exp() * (base - found)).sum(-1).mean())


@pytest.mark.parametrize("ridges", [(1e-4, 1e-2, 1.0, 1e2), (1e-2, 1e2, 1e4)])
def test_larger_ridges_are_taken_until_the_loss_no_longer_falls(
    model: PreTrainedModel, ridges: tuple[float, ...]
) -> None:
    windows, validation = build_windows(10), build_windows(12, seed=1)
    refits = [Refitter(model, windows, ridges=ridges[number:]).fit(PLAN) for number in range(len(ridges))]
    losses = [compute_kl(model, refit.weights, validation) for refit in refits]
    expected = next(n for n in range(len(ridges)) if n + 1 == len(ridges) or losses[n + 1] >= losses[n])
    assert losses[expected] < compute_kl(model, {}, validation)

    reports: list[tuple[int, int]] = []
    found = refit_by_loss(
        model, PLAN, windows, validation, ridges=ridges, on_progress=lambda *done: reports.append(done)
    )
    assert found.products == refits[expected].products
    assert all(torch.equal(weight, refits[expected].weights[name]) for name, weight in found.weights.items())
    assert reports[-1][0] == reports[-1][1]
    shares = [done / total for done, total in reports]
    assert shares == sorted(shares)


def test_a_refit_that_does_not_lower_the_loss_changes_nothing(model: PreTrainedModel) -> None:
    """Fitted to text of two tokens, and measured on text of all."""
    fitted = Windows(np.random.default_rng(0).integers(3, 5, (40, SEQ_LEN)).astype(np.int32), "two tokens")
    other = build_windows(20, seed=1)
    found = refit_by_loss(model, PLAN, fitted, other, ridges=(1e-6,))
    refit = Refitter(model, fitted, ridges=(1e-6,)).fit(PLAN)
    assert compute_kl(model, refit.weights, other) > compute_kl(model, {}, other)
    assert found.weights == {}
    assert found.products


def test_the_last_windows_of_each_kind_are_kept_to_choose_by() -> None:
    windows = build_windows(40, num_kinds=3)
    fitted, validation = split_validation(windows)
    assert (fitted.num_windows, validation.num_windows) == (3 * 38, 3 * 2)
    assert fitted.kinds == validation.kinds == windows.kinds
    for whole, first, last in zip(windows.split_kinds(), fitted.split_kinds(), validation.split_kinds(), strict=True):
        assert [*first.input_ids.tolist(), *last.input_ids.tolist()] == whole.input_ids.tolist()
    with pytest.raises(DataError, match=r"1 window of each kind of text leaves none to choose by; .* \(--windows\)"):
        split_validation(build_windows(1))
