"""The rotary embedding as llama.cpp's ``deci`` takes it: one base, a divisor for each frequency, neighbouring pairs.

Transformers turns dimension i of a head with dimension i + d/2; ``deci`` turns 2i with 2i + 1, so that the rows of
queries and keys are reordered within each head, which no product of the two notices. ``deci`` turns every dimension of
a head; one that is not to be turned (a partial rotary embedding) gets a frequency of nearly 0. All scalings with fixed
frequencies (linear, Llama 3's, YaRN) are divisors, in the tensor ``rope_freqs.weight``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lpsearch.models.traits import FamilyTraits

__all__ = ["Rotary", "order_rows", "read_rotary"]

_STILL = 1e30
"""Divisor of a frequency that is to be nothing: a turn by less than 1e-23 at any position changes no float32."""


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a model.

    Attributes:
        base: its base, theta.
        num_rotated: dimensions of a head that it turns, the first ones.
        divisors: what each pair's frequency base^(-2i / head_dim) is divided by, (head_dim / 2,); None where all are 1.
        scale: factor of the turned queries and keys (YaRN), that is its square of their products.
    """

    base: float
    num_rotated: int
    divisors: Tensor | None
    scale: float


def read_rotary(traits: FamilyTraits) -> Rotary:
    """Read the rotary embedding of a model in which :func:`~lpsearch.transform.deci.find_deci_obstacle` found none."""
    parameters: dict[str, Any] = traits.config.rope_parameters
    base, head_dim = float(parameters["rope_theta"]), traits.head_dim
    num_rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    kind = parameters.get("rope_type", "default")
    frequencies, scale = _compute_default(base, num_rotated), 1.0
    if kind != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](traits.config, device=torch.device("cpu"))
    if kind == "default" and num_rotated == head_dim:
        return Rotary(base, num_rotated, None, 1.0)
    divisors = torch.full((head_dim // 2,), _STILL, dtype=torch.float64)
    divisors[: num_rotated // 2] = _compute_default(base, head_dim)[: num_rotated // 2] / frequencies.double()
    return Rotary(base, num_rotated, divisors.float(), float(scale))


def order_rows(num_heads: int, head_dim: int, num_rotated: int) -> Tensor:
    """Return the order in which ``deci`` has the rows of queries or keys that transformers has in its own.

    Returns:
        (num_heads * head_dim,): for each row its place in transformers' order.
    """
    halves = torch.arange(num_rotated).view(2, -1).T.flatten()  # 0, d/2, 1, d/2 + 1, ...
    head = torch.cat([halves, torch.arange(num_rotated, head_dim)])
    return (torch.arange(num_heads)[:, None] * head_dim + head).flatten()


def _compute_default(base: float, num_rotated: int) -> Tensor:
    """Return the unscaled frequency of each pair of dimensions, (num_rotated / 2,) in float64."""
    return base ** (-torch.arange(0, num_rotated, 2, dtype=torch.float64) / num_rotated)
