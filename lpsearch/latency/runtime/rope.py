"""Tables of the rotary embedding (Su et al., arXiv 2104.09864), by kind of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lpsearch.errors import FamilyError
from lpsearch.models.traits import AttentionKind, FamilyTraits

__all__ = ["Rope"]


class Rope:
    """Rotary embedding of one kind of attention for the positions of a cache: x * cos + x[partner] * sin.

    The partner of an element is in the other half of the rotated part, or beside it where a family interleaves (GLM-4).
    Behind that part (partial rotation), and everywhere in layers without rotary embedding (NoPE), cos is 1 and sin 0.
    Scaled embeddings that depend on the length take that of ``num_positions``.

    Args:
        traits: of the model.
        kind: of attention.
        num_positions: positions of the cache.
        device: where the tables are.

    Attributes:
        table: (2, positions, head_dim) cosines and signed sines, float32.
        partner: (head_dim,) index of each element's partner.

    Raises:
        FamilyError: for rotary parameters that transformers does not know.
    """

    def __init__(self, traits: FamilyTraits, kind: AttentionKind, *, num_positions: int, device: torch.device) -> None:
        frequencies, factor = _compute_frequencies(traits, kind, num_positions=num_positions)
        half, dim = len(frequencies), 2 * len(frequencies)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)  # (positions, half)
        table = torch.zeros(2, num_positions, traits.head_dim)
        table[0] = 1
        table[0, :, :dim] = (angles.cos() * factor).repeat(1, 2)
        table[1, :, :half] = -angles.sin() * factor
        table[1, :, half:dim] = angles.sin() * factor
        partner = torch.cat([torch.arange(half, dim), torch.arange(half), torch.arange(dim, traits.head_dim)])
        if traits.family.interleaves_rope:
            order = torch.arange(dim).view(2, half).T.flatten()  # 0, half, 1, half + 1 ...
            table[..., :dim] = table[..., order]
            partner[:dim] = torch.arange(dim) ^ 1
        self.table, self.partner = table.to(device), partner.to(device)

    def rotate(self, heads: Tensor, start: int) -> Tensor:
        """Rotate (batch, seq, heads, head_dim) from position ``start`` on."""
        cos, sin = self.table[:, start : start + heads.shape[1], None]  # (seq, 1, head_dim) each
        x = heads.float()
        rotated: Tensor = x * cos + x[..., self.partner] * sin
        return rotated.to(heads.dtype)


def _compute_frequencies(traits: FamilyTraits, kind: AttentionKind, *, num_positions: int) -> tuple[Tensor, float]:
    """Return the angle a position of each pair of elements, (pairs,), and the factor of the table."""
    if not kind.rotates:
        return torch.zeros(0), 1.0
    config: Any = traits.config
    parameters = config.rope_parameters if kind.rope_key is None else config.rope_parameters[kind.rope_key]
    rope_type = parameters["rope_type"]
    if rope_type == "default":
        dim = int(traits.head_dim * parameters.get("partial_rotary_factor", 1.0))
        return 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0
    if rope_type not in ROPE_INIT_FUNCTIONS:
        raise FamilyError(f"rotary embedding of type {rope_type!r} is unknown to the installed transformers")
    options = {} if kind.rope_key is None else {"layer_type": kind.rope_key}
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=num_positions, **options)
