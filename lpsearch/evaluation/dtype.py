"""Which dtype to evaluate in, and the check that it is accurate enough."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lpsearch.data import Windows
from lpsearch.evaluation.evaluator import ModelEvaluator
from lpsearch.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DtypeCheck", "apply_dtype", "choose_dtype"]

logger = logging.getLogger(__name__)

_TOLERANCE_NATS_PER_TOKEN = 0.01
_CHECKED_TOKENS = 2048
_FAST_CPU_BF16 = frozenset({"amx_bf16", "avx512_bf16", "bf16", "sve_bf16"})


@dataclass(frozen=True)
class DtypeCheck:
    """Result of :func:`apply_dtype`.

    Attributes:
        dtype: what the model's weights are in now.
        requested: what was asked for.
        nll_difference: baseline NLL in the requested dtype minus in float32, nats per token.
    """

    dtype: torch.dtype
    requested: torch.dtype
    nll_difference: float


def choose_dtype(device: torch.device | str) -> torch.dtype:
    """Choose bfloat16 where the device multiplies it in hardware, else float32.

    Args:
        device: a CUDA device counts from compute capability 8.0, a CPU with AMX, AVX512-BF16 or ARM's bf16.
    """
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    elif device.type == "cpu":
        fast = _has_fast_cpu_bf16()
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


@torch.no_grad()
def apply_dtype(
    model: PreTrainedModel,
    *,
    dtype: torch.dtype,
    windows: Windows,
    num_tokens: int = _CHECKED_TOKENS,
    tolerance: float = _TOLERANCE_NATS_PER_TOKEN,
) -> DtypeCheck:
    """Cast the parameters of a float32 model in place, if that keeps its NLL; otherwise leave it in float32.

    Buffers keep their dtype: rotary frequencies in bfloat16 would be wrong by whole positions. Both copies of the
    weights exist during the check.

    Args:
        model: the unmodified model, in float32.
        dtype: what to cast to.
        windows: what to compare on.
        num_tokens: about how many tokens of them; few tokens measure rounding of either sign, not bias.
        tolerance: largest accepted difference of the baseline's NLL, nats per token.

    Raises:
        ValueError: for a model that is not in float32.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"the check compares with float32, and the model is in {model.dtype}; load it in float32")
    if dtype == torch.float32:
        return DtypeCheck(dtype, dtype, 0.0)
    reference_nll = _evaluate_baseline(model, windows, num_tokens)
    originals = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    difference = _evaluate_baseline(model, windows, num_tokens) - reference_nll
    if abs(difference) <= tolerance:  # false for nan
        model.config.dtype = dtype
        return DtypeCheck(dtype, dtype, difference)
    for name, parameter in model.named_parameters():
        parameter.data = originals[name]
    logger.warning(
        "the baseline's NLL in %s is %+.4f nats/token off float32's (at most %.4f is accepted): staying in float32",
        str(dtype).removeprefix("torch."),
        difference,
        tolerance,
    )
    return DtypeCheck(torch.float32, dtype, difference)


def _evaluate_baseline(model: PreTrainedModel, windows: Windows, num_tokens: int) -> float:
    evaluator = ModelEvaluator(model=model, windows=windows, cache_bytes=0)
    baseline = Plan.baseline(model.config.get_text_config().num_hidden_layers)
    num_windows = min(windows.num_windows, -(-num_tokens // windows.seq_len))
    losses = evaluator.evaluate_windows(baseline, range(num_windows))
    return sum(losses.nll_nats_per_token) / len(losses.nll_nats_per_token)


def _has_fast_cpu_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):  # from torch 2.10
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in _FAST_CPU_BF16)
    # Older versions tell through private functions, and only for x86.
    queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, query)() for query in queries if hasattr(torch.cpu, query))
