"""The scaling of the rotary embedding that a GGUF file holds and transformers' GGUF reader leaves out.

llama.cpp writes the scaling of Llama 3.1 and later as a tensor, ``rope_freqs.weight``: a divisor for each frequency. A
linear scaling is metadata. Without them a model runs, with other logits at every position but the first. Both are
expressed here as ``rope_parameters`` of the configuration, so that whatever reads the configuration sees them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from lpsearch.errors import ModelError
from lpsearch.models.gguf_header import GgufHeader, read_gguf_header, read_gguf_vector

__all__ = ["ROPE_FREQS", "apply_gguf_rope"]

ROPE_FREQS = "rope_freqs.weight"
"""Name of the tensor of divisors, one for each pair of rotated dimensions."""

_LLAMA3_CONTEXT = 8192
_LLAMA3_FACTORS = (1.0, 4.0)
_FLOAT32_ROUNDING = 1e-5
_MEND = "give the model's own directory instead of the GGUF file"


def apply_gguf_rope(config: PretrainedConfig, path: Path) -> PretrainedConfig:
    """Give a configuration that transformers read from a GGUF file the rotary scaling of that file.

    Args:
        config: the configuration, which is changed.
        path: the GGUF file.

    Returns:
        The same configuration.

    Raises:
        ModelError: if the scaling cannot be expressed as one of transformers' own.
    """
    header = read_gguf_header(path)
    _apply_metadata(config, header, path)
    if ROPE_FREQS not in header.tensors:
        return config
    divisors = read_gguf_vector(path, header.tensors[ROPE_FREQS])
    rope: dict[str, Any] = config.rope_parameters
    theta = rope.get("rope_theta")
    if divisors is None or theta is None or rope.get("rope_type", "default") != "default":
        raise ModelError(f"{path}: {ROPE_FREQS} scales a rotary embedding of {rope}, expected an unscaled one; {_MEND}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if len(divisors) != rotated // 2:
        raise ModelError(f"{path}: {ROPE_FREQS} has {len(divisors)} divisors, expected {rotated // 2}; {_MEND}")
    if np.all(divisors == 1):
        return config
    wavelengths = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    for parameters in _propose_llama3(divisors.astype(np.float64), wavelengths):
        if np.allclose(_llama3_divisors(parameters, wavelengths), divisors, rtol=_FLOAT32_ROUNDING, atol=0):
            config.rope_parameters = {**rope, "rope_type": "llama3", **parameters}
            return config
    raise ModelError(
        f"{path}: {ROPE_FREQS} divides the rotary frequencies by {divisors.min():g} to {divisors.max():g} in another "
        f"way than Llama 3's scaling, and transformers has no other for it; {_MEND}"
    )


def _apply_metadata(config: PretrainedConfig, header: GgufHeader, path: Path) -> None:
    """Apply a scaling that is written in the metadata, as llama.cpp reads it.

    Raises:
        ModelError: if it is not a linear one, and transformers has not read it.
    """
    prefix = f"{header.architecture}.rope."
    factor = header.metadata.get(f"{prefix}scaling.factor") or header.metadata.get(f"{prefix}scale_linear") or 1.0
    kind = header.metadata.get(f"{prefix}scaling.type", "linear")
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    # Where kinds of layers have parameters of their own (Gemma 3), llama.cpp scales the layers with full attention.
    scaled: dict[str, Any] = rope.get("full_attention", rope)
    if kind == "none" or factor == 1 or scaled.get("rope_type") == kind:
        return
    if kind != "linear" or scaled.get("rope_type", "default") != "default":
        raise ModelError(
            f"{path}: its rotary embedding is scaled ({prefix}scaling.type is {kind!r}, the factor {factor:g}), which "
            f"transformers' GGUF reader leaves out; {_MEND}"
        )
    linear = {**scaled, "rope_type": "linear", "factor": float(factor)}
    config.rope_parameters = {**rope, "full_attention": linear} if "full_attention" in rope else linear


def _llama3_divisors(parameters: dict[str, Any], wavelengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute what Llama 3's scaling divides each rotary frequency by.

    Short waves keep their frequency, long ones have it divided by the factor, and between the two the frequency, not
    the divisor, changes linearly in the number of waves that the original context holds (Llama 3.1's
    ``apply_scaling``, https://github.com/meta-llama/llama-models).
    """
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    num_waves = parameters["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((num_waves - low) / (high - low), 0, 1)
    divisors: NDArray[np.float64] = 1 / ((1 - smooth) / parameters["factor"] + smooth)
    return divisors


def _propose_llama3(divisors: NDArray[np.float64], wavelengths: NDArray[np.float64]) -> Iterator[dict[str, Any]]:
    """Yield parameters of Llama 3's scaling that may give these divisors: the published ones, then a fit.

    Only ratios of the context and the two frequency factors matter, so the context stays at the published 8192. Where
    frequencies lie between the two bounds, ``smooth`` is a line in the number of waves, which two of them determine.
    """
    factor = float(divisors.max())

    def build(low: float, high: float) -> dict[str, Any]:
        bounds = {"low_freq_factor": low, "high_freq_factor": high}
        return {"factor": factor, **bounds, "original_max_position_embeddings": _LLAMA3_CONTEXT}

    yield build(*_LLAMA3_FACTORS)
    between = np.flatnonzero((divisors > 1 + _FLOAT32_ROUNDING) & (divisors < factor * (1 - _FLOAT32_ROUNDING)))
    if len(between) < 2:
        return
    smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    num_waves = _LLAMA3_CONTEXT / wavelengths[between]
    slope, offset = np.polyfit(num_waves, smooth, 1)
    low, high = float(-offset / slope), float((1 - offset) / slope)
    if 0 < low < high:  # which transformers' arithmetic needs
        yield build(round(low, 3), round(high, 3))
        yield build(low, high)
