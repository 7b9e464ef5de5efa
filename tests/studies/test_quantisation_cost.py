"""The estimate of what quantisation costs: its steps are those of the format, and its errors have their size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from lpsearch.errors import ModelError
from studies.quantisation_cost import add_rounding_errors, check_levels, find_steps


@pytest.fixture(scope="module")
def original() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)


def _round_trip(values: np.ndarray) -> torch.Tensor:
    kind = GGMLQuantizationType.Q4_1
    return torch.from_numpy(np.ascontiguousarray(dequantize(quantize(values, kind), kind)))


def test_steps_are_those_that_the_format_stores(original: np.ndarray) -> None:
    stored = quantize(original, GGMLQuantizationType.Q4_1).reshape(-1, 20)  # a block: step, minimum, 16 bytes of levels
    steps = stored[:, :2].copy().view(np.float16).astype(np.float32)
    found = find_steps(_round_trip(original)).reshape(-1, 1)
    torch.testing.assert_close(found, torch.from_numpy(steps), rtol=1e-3, atol=0)


def test_added_errors_are_as_large_as_those_of_quantising(original: np.ndarray) -> None:
    quantised = _round_trip(original)
    check_levels(quantised)
    noisy = add_rounding_errors(quantised, torch.Generator().manual_seed(0))
    added, true = (noisy - quantised).square().mean(), (quantised - torch.from_numpy(original)).square().mean()
    assert 0.8 < float(added / true) < 1.25
    assert ((noisy - quantised).unflatten(-1, (-1, 32)).abs() <= find_steps(quantised) / 2 * (1 + 1e-5)).all()


def test_weights_of_another_type_are_refused(original: np.ndarray) -> None:
    with pytest.raises(ModelError, match="on no level"):
        check_levels(torch.from_numpy(original))
