"""Ridge regression from streamed sums, against least squares on stacked matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lpsearch.recovery.ridge import Fit, Gram, fit_ridge
from tests.tolerances import FLOAT64_REGRESSION

NUM_INPUTS, NUM_OUTPUTS = 7, 4
RIDGES = (1e-4, 1e-2, 1.0, 100.0)
Tokens = tuple[Tensor, Tensor, Tensor]


def draw_tokens(num_tokens: int, *, seed: int, noise: float = 0.3, is_weighted: bool = True) -> Tokens:
    """Draw inputs, residuals that depend on them in one way for all seeds, and weights."""
    change = torch.randn(NUM_INPUTS, NUM_OUTPUTS, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_tokens, NUM_INPUTS, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.linspace(0.1, 2.0, NUM_INPUTS, dtype=torch.float64)
    noises = noise * torch.randn(num_tokens, NUM_OUTPUTS, generator=generator, dtype=torch.float64)
    weights = 0.1 + torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    return inputs, inputs @ change + noises, weights if is_weighted else torch.ones_like(weights)


def build_gram(*parts: Tokens) -> Gram:
    gram = Gram(NUM_INPUTS, NUM_OUTPUTS, device=torch.device("cpu"))
    for part in parts:
        gram.add(*part)
    return gram


def join(*parts: Tokens) -> Tokens:
    inputs, residuals, weights = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return inputs, residuals, weights


def solve_slowly(tokens: Tokens, ridge: float) -> Tensor:
    """Solve the regression as least squares on [Z; sqrt(lambda) I], every token's row times the root of its weight."""
    inputs, residuals, weights = tokens
    scaled = inputs * weights.sqrt()[:, None]
    penalty = ridge * float(scaled.square().sum(0).mean())
    stacked = torch.cat([scaled, math.sqrt(penalty) * torch.eye(NUM_INPUTS, dtype=torch.float64)])
    targets = torch.cat(
        [residuals * weights.sqrt()[:, None], torch.zeros(NUM_INPUTS, NUM_OUTPUTS, dtype=torch.float64)]
    )
    return torch.linalg.lstsq(stacked, targets).solution


def sum_errors(tokens: Tokens, change: Tensor) -> float:
    inputs, residuals, weights = tokens
    total = 0.0
    for row, residual, weight in zip(inputs, residuals, weights, strict=True):
        total += float(weight * (residual - row @ change).square().sum())
    return total


def close(value: float | Tensor) -> object:
    return pytest.approx(value, rel=FLOAT64_REGRESSION, abs=FLOAT64_REGRESSION)


def fit(fitted: Tokens, validation: Tokens, ridges: tuple[float, ...] = RIDGES) -> Fit:
    return fit_ridge(build_gram(fitted), build_gram(validation), ridges)


@pytest.mark.parametrize("is_weighted", [True, False])
def test_the_error_of_a_change_is_known_from_the_sums(is_weighted: bool) -> None:
    parts = [draw_tokens(num, seed=seed, is_weighted=is_weighted) for seed, num in enumerate((5, 1, 12))]
    gram = build_gram(*parts)
    assert gram.num_tokens == 18
    for change in (torch.zeros(NUM_INPUTS, NUM_OUTPUTS, dtype=torch.float64), solve_slowly(parts[2], 0.5)):
        assert float(gram.compute_error(change)) == close(sum_errors(join(*parts), change))


def test_sums_merge_as_if_they_had_been_one() -> None:
    parts = [draw_tokens(9, seed=seed) for seed in range(2)]
    merged = build_gram(parts[0])
    merged.merge(build_gram(parts[1]))
    whole = build_gram(*parts)
    assert merged.num_tokens == whole.num_tokens == 18
    for name in ("inputs", "products", "residual"):
        assert torch.allclose(getattr(merged, name), getattr(whole, name), rtol=FLOAT64_REGRESSION, atol=0), name


def test_sums_of_low_precision_tokens_are_in_float64() -> None:
    tokens = draw_tokens(500, seed=0)
    low = (tokens[0].bfloat16(), tokens[1].bfloat16(), tokens[2].float())
    gram = build_gram(low)
    assert gram.inputs.dtype == gram.products.dtype == gram.residual.dtype == torch.float64
    expected = build_gram((low[0].double(), low[1].double(), low[2].double()))
    assert torch.equal(gram.inputs, expected.inputs)
    assert torch.equal(gram.products, expected.products)


@pytest.mark.parametrize("ridge", RIDGES)
def test_a_change_is_the_solution_of_least_squares(ridge: float) -> None:
    fitted, validation = draw_tokens(40, seed=1), draw_tokens(10, seed=2)
    found = fit(fitted, validation, (ridge,))
    assert found.ridge == ridge
    assert torch.allclose(
        found.change, solve_slowly(join(fitted, validation), ridge), rtol=FLOAT64_REGRESSION, atol=FLOAT64_REGRESSION
    )
    assert found.error_before == close(sum_errors(validation, torch.zeros_like(found.change)) / 10)
    assert found.error_after == close(sum_errors(validation, solve_slowly(fitted, ridge)) / 10)


@pytest.mark.parametrize(("num_tokens", "noise"), [(8, 2.0), (12, 0.5), (400, 0.1)])
def test_the_ridge_that_validates_best_is_taken(num_tokens: int, noise: float) -> None:
    fitted, validation = draw_tokens(num_tokens, seed=3, noise=noise), draw_tokens(50, seed=4, noise=noise)
    errors = {ridge: sum_errors(validation, solve_slowly(fitted, ridge)) for ridge in RIDGES}
    best = min(errors, key=errors.__getitem__)
    found = fit(fitted, validation)
    assert found.ridge == best
    assert found.error_after == close(errors[best] / 50)
    assert found.error_after < found.error_before


def test_few_noisy_tokens_need_a_larger_ridge_than_many() -> None:
    few = fit(draw_tokens(8, seed=3, noise=2.0), draw_tokens(50, seed=4, noise=2.0))
    many = fit(draw_tokens(400, seed=3, noise=0.1), draw_tokens(50, seed=4, noise=0.1))
    assert few.ridge is not None
    assert many.ridge is not None
    assert few.ridge > many.ridge


def test_a_change_that_does_not_validate_is_none() -> None:
    fitted, (inputs, residuals, weights) = draw_tokens(40, seed=5), draw_tokens(20, seed=6)
    found = fit(fitted, (inputs, -residuals, weights))  # any change towards what was fitted is away from this
    assert found.ridge is None
    assert not found.change.any()
    assert found.error_after == found.error_before > 0


def test_without_validation_tokens_nothing_is_changed() -> None:
    empty: Tokens = (torch.zeros(0, NUM_INPUTS), torch.zeros(0, NUM_OUTPUTS), torch.zeros(0))
    found = fit(draw_tokens(40, seed=5), empty)
    assert found.ridge is None
    assert not found.change.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_change_nothing(value: float) -> None:
    inputs, residuals, weights = draw_tokens(40, seed=7)
    inputs[3, 2] = value
    assert fit((inputs, residuals, weights), draw_tokens(10, seed=8)).ridge is None
    found = fit(draw_tokens(40, seed=7), (inputs, residuals, weights))
    assert found.ridge is None
    assert not found.change.any()


def test_a_weight_counts_as_so_many_tokens() -> None:
    inputs, residuals, _ = draw_tokens(40, seed=9)
    counts = torch.arange(40) % 3 + 1
    validation = draw_tokens(20, seed=10)
    weighted = fit((inputs, residuals, counts.double()), validation)
    repeated = fit(
        (inputs.repeat_interleave(counts, 0), residuals.repeat_interleave(counts, 0), torch.ones(int(counts.sum()))),
        validation,
    )
    assert weighted.ridge == repeated.ridge
    assert torch.allclose(weighted.change, repeated.change, rtol=FLOAT64_REGRESSION, atol=FLOAT64_REGRESSION)


def test_a_ridge_that_cannot_be_solved_is_passed_over() -> None:
    inputs, residuals, weights = draw_tokens(40, seed=11)
    inputs[:, 1] = inputs[:, 0]  # without a ridge the matrix is singular
    inputs[:, 3] = 0
    found = fit((inputs, residuals, weights), draw_tokens(10, seed=12), (1e-300, 1e-2))
    assert found.ridge == 1e-2
    assert found.change.isfinite().all()
