"""Plans over six layers, and logits to compare a fused model with the unfused plan."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lpsearch.models.families import get_decoder_layers
from lpsearch.models.traits import OUTPUTS, read_traits
from lpsearch.plan import Plan
from lpsearch.transform import applied_plan
from tests.tiny_models import build_left_padded_batch

__all__ = [
    "DROPPING",
    "MIXED",
    "PAIRS",
    "compute_logits",
    "compute_planned_logits",
    "relative_difference",
    "silence_dropped",
]

PAIRS = Plan.from_groups([[0, 1], [2, 3], [4, 5]])
MIXED = Plan.from_groups([[0], [1, 2], [3, 4, 5]])

DROPPING = {
    "within groups": MIXED.drop({"attention": [2], "mlp": [3, 4]}),
    "before the first attention and after another": Plan.from_groups(
        [[0, 1], [2], [3], [4, 5]], dropped={"attention": [0, 1, 3]}
    ),
    "a layer, and an attention before another": Plan.from_groups(
        [[0], [1, 2], [3], [4], [5]], dropped={"attention": [3, 4], "mlp": [0, 3]}
    ),
    "attentions of one group and MLPs of the next": Plan.from_groups(
        [[0], [1, 2], [3, 4], [5]], dropped={"attention": [0, 3, 4], "mlp": [1, 2]}
    ),
    "the end": Plan.from_groups([[0], [1, 2, 3], [4, 5]], dropped={"attention": [4, 5], "mlp": [1, 4]}),
}
"""Plans that drop branches, by where: each arranges what is left in its own way."""


def silence_dropped(model: PreTrainedModel, plan: Plan) -> Plan:
    """Make the branches that a plan drops add nothing, and return the plan that drops none.

    A branch whose output projection is zero gives zero, whatever norm comes after it. So it is the slow and obvious
    way to drop a branch, with all the work done.
    """
    projections = read_traits(model.config).family.projections
    outputs = {packed[0]: module for module, packed in projections.items() if packed[0] in OUTPUTS}
    for branch, projection in (("attention", "o"), ("mlp", "down")):
        for layer_idx in plan.dropped[branch]:
            module = get_decoder_layers(model)[layer_idx].get_submodule(outputs[projection])
            for parameter in module.parameters():
                with torch.no_grad():
                    parameter.zero_()
    return Plan.from_groups(plan.to_lists())


def compute_logits(model: PreTrainedModel) -> Tensor:
    """Logits of the real tokens of a batch that is padded on the left, (tokens, vocab)."""
    batch = build_left_padded_batch()
    return model(**batch).logits[batch["attention_mask"].bool()].detach().float()


def compute_planned_logits(model: PreTrainedModel, plan: Plan) -> Tensor:
    """Logits of the unfused model under a plan; the model stays as it is."""
    if plan.num_dropped:
        model = copy.deepcopy(model)
        plan = silence_dropped(model, plan)
    with applied_plan(model, plan):
        return compute_logits(model)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
