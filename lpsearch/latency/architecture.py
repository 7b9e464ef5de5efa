"""Which models the runtime computes, and the tables of their rotary embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lpsearch.errors import FamilyError
from lpsearch.models.traits import AttentionKind, AttentionPart, FamilyTraits, read_traits

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "Architecture",
    "AttentionKind",
    "Segment",
    "build_rope_table",
    "read_architecture",
    "rope_partner",
]

Architecture = FamilyTraits
Segment = AttentionPart


def read_architecture(config: PretrainedConfig) -> FamilyTraits:
    """Read the traits of a model that the runtime computes.

    Args:
        config: a transformers configuration, text or with a text part.

    Raises:
        FamilyError: for a model that the runtime does not compute, with the reason.
    """
    traits = read_traits(config)
    if traits.runtime_obstacle is not None:
        raise FamilyError(
            f"model type {traits.config.model_type}: the runtime computes dense sequential layers, and "
            f"{traits.runtime_obstacle}; it is measured by transformers' own execution"
        )
    return traits


def build_rope_table(architecture: Architecture, kind: AttentionKind, *, num_positions: int) -> torch.Tensor:
    """Build cosines and signed sines of the rotary embedding, so that rotating is ``x * cos + x[partner] * sin``.

    ``partner`` is the other half of the rotated part; behind it (partial rotation) cos is 1 and sin 0. Scaled
    embeddings that depend on the length take that of ``num_positions``.

    Returns:
        (2, num_positions, head_dim), float32, on the CPU.

    Raises:
        FamilyError: for rotary parameters that transformers does not know.
    """
    config: Any = architecture.config
    parameters = config.rope_parameters if kind.rope_key is None else config.rope_parameters[kind.rope_key]
    rope_type = parameters["rope_type"]
    if rope_type == "default":
        dim = int(architecture.head_dim * parameters.get("partial_rotary_factor", 1.0))
        frequencies = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        factor = 1.0
    elif rope_type in ROPE_INIT_FUNCTIONS:
        options = {} if kind.rope_key is None else {"layer_type": kind.rope_key}
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](
            config, torch.device("cpu"), seq_len=num_positions, **options
        )
    else:
        raise FamilyError(f"rotary embedding of type {rope_type!r} is unknown to the installed transformers")
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)  # (num_positions, dim / 2)
    table = torch.zeros(2, num_positions, architecture.head_dim)
    table[0] = 1
    half, dim = angles.shape[1], 2 * angles.shape[1]
    table[0, :, :dim] = (angles.cos() * factor).repeat(1, 2)
    table[1, :, :half] = -angles.sin() * factor
    table[1, :, half:dim] = angles.sin() * factor
    return table


def rope_partner(architecture: Architecture, kind: AttentionKind) -> torch.Tensor:
    """Return the index of each element's partner in the rotation, ``(head_dim,)``."""
    config: Any = architecture.config
    parameters = config.rope_parameters if kind.rope_key is None else config.rope_parameters[kind.rope_key]
    half = int(architecture.head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2
    rest = torch.arange(2 * half, architecture.head_dim)
    return torch.cat([torch.arange(half, 2 * half), torch.arange(half), rest])
