"""The linear modules of a branch that a refit changes: those that read the branch's input, and the one that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from lpsearch.models.families import DecoderBlock

__all__ = [
    "PROJECTION_NAMES",
    "STAGES",
    "Stage",
    "find_input_projections",
    "find_output_projection",
    "find_widest_input",
    "get_branch",
]

Stage = Literal["attention", "mlp"]

STAGES: tuple[Stage, ...] = ("attention", "mlp")

_INPUT_NAMES = {
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"),
    "mlp": ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h"),
}
_OUTPUT_NAMES = {"attention": ("o_proj", "dense", "out_proj"), "mlp": ("down_proj", "c_proj", "fc2", "dense_4h_to_h")}

PROJECTION_NAMES = {stage: (*_INPUT_NAMES[stage], *_OUTPUT_NAMES[stage]) for stage in STAGES}
"""Names within a branch of what a refit may change."""


def get_branch(block: DecoderBlock, stage: Stage) -> tuple[str, nn.Module]:
    """Return the name of a branch's module within its layer, and the module."""
    name = block.form.attention if stage == "attention" else "mlp"
    return name, getattr(block.layer, name)


def find_input_projections(block: DecoderBlock, stage: Stage) -> dict[str, nn.Linear]:
    """Find the linear modules that read a branch's input, by name within the branch.

    Empty where one of them is something else, e.g. in a mixture of experts.
    """
    _, module = get_branch(block, stage)
    found = {name: getattr(module, name) for name in _INPUT_NAMES[stage] if hasattr(module, name)}
    return found if all(isinstance(linear, nn.Linear) for linear in found.values()) else {}


def find_output_projection(block: DecoderBlock, stage: Stage) -> tuple[str | None, nn.Linear | None]:
    """Find the linear module that a branch ends in: its name within the branch, and it; None where it is not linear."""
    _, module = get_branch(block, stage)
    name = next((name for name in _OUTPUT_NAMES[stage] if hasattr(module, name)), None)
    linear = None if name is None else getattr(module, name)
    return name, linear if isinstance(linear, nn.Linear) else None


def find_widest_input(blocks: Sequence[DecoderBlock]) -> int:
    """Return the most inputs of a layer's output projection; 0 where none can be fitted."""
    linears = [find_output_projection(block, stage)[1] for block in blocks for stage in STAGES]
    return max((linear.in_features for linear in linears if linear is not None), default=0)
