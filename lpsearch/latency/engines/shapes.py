"""What every engine is given: the model's shape under a plan, and a short generation whose steps are timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lpsearch.latency.fallback import select_layers
from lpsearch.latency.mix import Workload
from lpsearch.latency.runtime.memory import align_elements
from lpsearch.plan import Plan
from lpsearch.transform.fused_config import build_fused_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lpsearch.models.traits import FamilyTraits

__all__ = [
    "Generation",
    "build_plan_config",
    "changes_nothing",
    "choose_generation",
    "count_layer_elements",
    "select_config",
]

_MAX_STEPS = 16
"""Decode steps of one timed call: enough that what a call does besides them is a small part of its time."""


@dataclass(frozen=True)
class Generation:
    """One call of an engine.

    Attributes:
        num_prompt_tokens: of each sequence.
        num_steps: decode steps that are timed, after the prompt and its first token; 0 where the prompt is.
    """

    num_prompt_tokens: int
    num_steps: int

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt; which ones does not matter to the time, as long as all models read them."""
        return [1 + position % 16 for position in range(self.num_prompt_tokens)]

    @property
    def num_new_tokens(self) -> int:
        """Tokens that the call generates; the first of them comes with the prompt."""
        return self.num_steps + 1

    @property
    def num_tokens(self) -> int:
        """Tokens of a sequence at the end, the last of which is never read."""
        return self.num_prompt_tokens + self.num_new_tokens


def choose_generation(workload: Workload) -> Generation:
    """Choose the call that times a workload: of decode steps, the last one reads the workload's cached tokens.

    So the mean step of a call reads up to 8 tokens less than the workload says, and no model reads more than it can.

    Args:
        workload: of at least one token.
    """
    if workload.kind == "prefill":
        return Generation(workload.context_len, 0)
    num_steps = min(_MAX_STEPS, workload.context_len)
    return Generation(workload.context_len - num_steps + 1, num_steps)


def count_layer_elements(traits: FamilyTraits) -> int:
    """Return the elements of one layer's weights, each tensor with the room that its alignment takes."""
    return sum(align_elements(math.prod(shape)) for shape in traits.list_tensor_shapes().values())


def changes_nothing(plan: Plan) -> bool:
    """Say whether a plan is the unmodified model."""
    return plan.groups == Plan.baseline(plan.num_layers).groups


def select_config(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """Return the configuration of a model of these layers of a model, in this order."""
    selected = copy.deepcopy(config)
    for name, value in select_layers(config, layers).items():
        setattr(selected, name, value)
    return selected


def build_plan_config(config: PretrainedConfig, plan: Plan, layers: Sequence[int]) -> PretrainedConfig:
    """Build the configuration that ``lpsearch export`` would write, or the family's own where the plan changes nothing.

    Args:
        config: of the model.
        plan: groups over the layers.
        layers: layers of the model that the plan is over.

    Raises:
        FamilyError: if the family cannot be fused.
    """
    selected = select_config(config, layers)
    return selected if changes_nothing(plan) else build_fused_config(selected, plan)
