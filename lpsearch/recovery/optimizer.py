"""AdamW with a learning rate that is relative to the size of each weight.

Models differ in the size of their weights more than in anything else that matters here: the root mean square of a
matrix is about 0.19 in SmolLM2-135M, 0.04 in Gemma 3 270M and 0.017 in Qwen2.5-Coder-0.5B, and one absolute rate that
trains the first destroys the others. So a tensor's rate is the learning rate times its root mean square, as in
Adafactor (Shazeer and Stern, arXiv 1804.04235, section 8).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

__all__ = ["build_optimizer", "find_rate_scale", "set_learning_rate"]

ADAPTER_SCALE = 0.1
"""Adapters begin at zero and have no size of their own."""

_LEAST_SIZE = 1e-3
_BETAS = (0.9, 0.95)


def find_rate_scale(parameter: nn.Parameter, *, is_adapter: bool = False) -> float:
    """Return what the learning rate of a tensor is multiplied by.

    Args:
        parameter: with the values that training begins with.
        is_adapter: whether it is part of an adapter.

    Returns:
        The root mean square, at least 0.001, rounded to a power of the square root of two, so that many tensors share
        a rate and are updated together; 0.1 for adapters.
    """
    if is_adapter:
        return ADAPTER_SCALE
    size = max(_LEAST_SIZE, float(parameter.detach().float().square().mean().sqrt()))
    return float(2 ** (round(2 * math.log2(size)) / 2))


def build_optimizer(
    trained: Mapping[str, nn.Parameter], *, weight_decay: float, uses_adapters: bool, fused: bool
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter, arXiv 1711.05101), which decays matrices alone.

    Args:
        trained: the weights under training, by name, with the values that training begins with.
        weight_decay: of matrices.
        uses_adapters: whether the weights are those of adapters.
        fused: update a group of tensors in one kernel, on a GPU.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in trained.values():
        key = find_rate_scale(parameter, is_adapter=uses_adapters), parameter.ndim >= 2
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "rate_scale": scale, "weight_decay": weight_decay if is_matrix else 0.0}
            for (scale, is_matrix), group in sorted(groups.items(), key=lambda item: item[0])
        ],
        betas=_BETAS,
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next update, relative to the size of the weights."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]
