"""Plans over six layers, and logits to compare a fused model with the unfused plan."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from lpsearch.plan import Plan
from lpsearch.transform import applied_plan
from tests.tiny_models import build_left_padded_batch

__all__ = ["MIXED", "PAIRS", "compute_logits", "compute_planned_logits", "relative_difference"]

PAIRS = Plan.from_groups([[0, 1], [2, 3], [4, 5]])
MIXED = Plan.from_groups([[0], [1, 2], [3, 4, 5]])


def compute_logits(model: PreTrainedModel) -> Tensor:
    """Logits of the real tokens of a batch that is padded on the left, (tokens, vocab)."""
    batch = build_left_padded_batch()
    return model(**batch).logits[batch["attention_mask"].bool()].detach().float()


def compute_planned_logits(model: PreTrainedModel, plan: Plan) -> Tensor:
    with applied_plan(model, plan):
        return compute_logits(model)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
