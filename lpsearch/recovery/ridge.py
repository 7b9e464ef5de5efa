"""Ridge regression from streamed Gram matrices: what a product is fitted by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Fit", "Gram", "fit_ridge"]


class Gram:
    """Sums over tokens from which a regression is solved and its error known, in float64.

    Attributes:
        inputs: Z'Z, (inputs, inputs).
        products: Z'R, (inputs, outputs).
        residual: sum of the squares of R.
        num_tokens: rows that were added.

    Args:
        num_inputs: columns of Z.
        num_outputs: columns of R.
        device: where the sums are.
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, device: torch.device) -> None:
        self.inputs = torch.zeros(num_inputs, num_inputs, dtype=torch.float64, device=device)
        self.products = torch.zeros(num_inputs, num_outputs, dtype=torch.float64, device=device)
        self.residual = torch.zeros((), dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, inputs: Tensor, residuals: Tensor, weights: Tensor) -> None:
        """Add tokens.

        Args:
            inputs: Z, (tokens, inputs).
            residuals: R, (tokens, outputs).
            weights: (tokens,), what each token's squared error counts.
        """
        roots = weights.double().sqrt()[:, None]
        scaled_inputs, scaled_residuals = inputs.double() * roots, residuals.double() * roots
        self.inputs.addmm_(scaled_inputs.T, scaled_inputs)
        self.products.addmm_(scaled_inputs.T, scaled_residuals)
        self.residual += scaled_residuals.square().sum()
        self.num_tokens += len(inputs)

    def merge(self, other: Gram) -> None:
        """Add the tokens of another sum."""
        self.inputs += other.inputs
        self.products += other.products
        self.residual += other.residual
        self.num_tokens += other.num_tokens

    def compute_error(self, change: Tensor) -> Tensor:
        """Return the sum of squares of R - Z @ change, a scalar.

        Args:
            change: (inputs, outputs).
        """
        return self.residual - 2 * (change * self.products).sum() + (change * (self.inputs @ change)).sum()


@dataclass(frozen=True)
class Fit:
    """A regression that was solved.

    Attributes:
        change: (inputs, outputs), what is added to the weight, float64; zeros where no ridge helped.
        ridge: the ridge taken, as a share of the mean square of an input; None where no ridge helped.
        error_before: mean squared error over the validation tokens without the change.
        error_after: and with the change that the other tokens gave.
    """

    change: Tensor
    ridge: float | None
    error_before: float
    error_after: float


def fit_ridge(fitted: Gram, validation: Gram, ridges: Sequence[float]) -> Fit:
    """Solve (Z'Z + ridge * s I) change = Z'R, s the mean diagonal of Z'Z, with the ridge that validates best.

    Ridge regression: Hoerl and Kennard 1970. The ridge is chosen by the error on the validation tokens; the change is
    then solved again with all tokens. A change that does not lower that error is none.

    Args:
        fitted: the tokens to fit.
        validation: other tokens; merged into ``fitted`` afterwards.
        ridges: to choose from, positive.
    """
    best_ridge, best_error = None, validation.residual
    for ridge in ridges:
        change = _solve(fitted, ridge)
        if change is not None:
            error = validation.compute_error(change)
            if bool(error < best_error):  # false for nan
                best_ridge, best_error = ridge, error
    count = max(1, validation.num_tokens)
    before, after = float(validation.residual) / count, float(best_error) / count
    fitted.merge(validation)
    change = None if best_ridge is None else _solve(fitted, best_ridge)
    if change is None:
        return Fit(torch.zeros_like(fitted.products), None, before, before)
    return Fit(change, best_ridge, before, after)


def _solve(gram: Gram, ridge: float) -> Tensor | None:
    """Solve for the change; None where the matrix is not positive definite in float64."""
    matrix = gram.inputs.clone()
    diagonal = matrix.diagonal()
    diagonal += ridge * diagonal.mean()
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        return None
    return torch.cholesky_solve(gram.products, factor)
