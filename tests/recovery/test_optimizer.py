"""Learning rates that are relative to the size of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lpsearch.recovery.optimizer import build_optimizer, find_rate_scale, set_learning_rate

RATE = 0.01


def draw(shape: tuple[int, ...], *, size: float) -> nn.Parameter:
    return nn.Parameter(size * torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("uses_adapters", [False, True])
def test_the_first_update_moves_a_tensor_by_a_share_of_its_size(uses_adapters: bool) -> None:
    sizes = {"small": 0.017, "other small": 0.017, "large": 0.19, "bias": 30.0, "zero": 0.0}
    trained = {name: draw((64,) if name == "bias" else (64, 64), size=size) for name, size in sizes.items()}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = build_optimizer(trained, weight_decay=0.0, uses_adapters=uses_adapters, fused=False)
    set_learning_rate(optimizer, RATE)
    # The gradient's own size does not matter to Adam, whose first update is its sign times the rate.
    torch.stack([(1000 * parameter).sum() for parameter in trained.values()]).sum().backward()
    optimizer.step()
    for name, parameter in trained.items():
        moved = (before[name] - parameter.detach()).double()
        expected = 0.1 if uses_adapters else max(0.001, float(before[name].square().mean().sqrt()))
        ratio = float(moved.mean()) / (RATE * expected)
        # Sizes are rounded to powers of the square root of two.
        assert 2**-0.26 < ratio < 2**0.26, name
        assert float(moved.std()) < 0.01 * float(moved.mean()), name


def test_tensors_of_about_one_size_share_a_rate_and_only_matrices_decay() -> None:
    trained = {name: draw((64, 64), size=0.0177 + 0.0001 * index) for index, name in enumerate("abc")}
    trained["vector"] = draw((64,), size=0.0177)
    optimizer = build_optimizer(trained, weight_decay=0.5, uses_adapters=False, fused=False)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(1, 0.0), (3, 0.5)]
    assert find_rate_scale(trained["a"]) == pytest.approx(2 ** (math.floor(2 * math.log2(0.0177) + 0.5) / 2))
