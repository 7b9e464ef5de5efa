"""How fast a device evaluates a model of some shape: measured on a few layers with made-up weights.

The few layers run through :class:`~.evaluator.ModelEvaluator` itself, at two depths. The difference is the time of
layers; what is left is that of the embedding, the head and the losses. No weight of the model is read.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lpsearch.data import Windows
from lpsearch.errors import LpsearchError, describe_error
from lpsearch.evaluation.evaluator import ModelEvaluator, choose_batch_size
from lpsearch.models.memory import find_free_bytes
from lpsearch.plan import Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["EvaluationRates", "ModelSize", "measure_evaluation_rates", "measure_model_size"]

_MOST_FLOPS = {"cpu": 4e11, "cuda": 4e14}
"""Of one pass of the deeper model, so that a probe takes seconds; fewer tokens are run where a window has more."""

_PROBE_S = 2.0
_LEAST_RUNS = 3


@dataclass(frozen=True)
class ModelSize:
    """The size of a model, without its weights.

    Attributes:
        num_layers: decoder layers.
        num_parameters: all, tied ones once.
        num_layer_parameters: those of an average decoder layer.
        hidden_size: numbers of a hidden state.
        intermediate_size: numbers inside an MLP.
        attention_size: numbers of all query heads together.
        vocab_size: logits of a position.
    """

    num_layers: int
    num_parameters: int
    num_layer_parameters: float
    hidden_size: int
    intermediate_size: int
    attention_size: int
    vocab_size: int

    def count_layer_flops(self, seq_len: int) -> float:
        """Count the operations of one layer on one token, on average over a window; every expert counts."""
        return 2 * self.num_layer_parameters + 2 * seq_len * self.attention_size

    def count_rest_flops(self, num_heads: int = 1) -> float:
        """Count the operations of the head on one token."""
        return 2.0 * num_heads * self.hidden_size * self.vocab_size


@dataclass(frozen=True)
class EvaluationRates:
    """How fast windows are evaluated.

    Attributes:
        layer_s: of one layer on one window, in seconds.
        rest_s: of everything but the layers on one window, in seconds.
        activation_bytes: most that a batch takes beside weights and kept hidden states.
        probe_tokens: tokens that were run at once; 0 where nothing was measured.
    """

    layer_s: float
    rest_s: float
    activation_bytes: int
    probe_tokens: int


def measure_model_size(config: PretrainedConfig) -> ModelSize:
    """Build a model on the meta device, and count.

    Args:
        config: its configuration.
    """
    text_config = config.get_text_config(decoder=True)
    sizes = {
        count: _build_on_meta(_select_layers(config, range(count))).num_parameters()
        for count in (1, text_config.num_hidden_layers)
    }
    num_layers = text_config.num_hidden_layers
    smallest, whole = sizes[1], sizes[num_layers]
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    return ModelSize(
        num_layers=num_layers,
        num_parameters=whole,
        num_layer_parameters=(whole - smallest) / (num_layers - 1) if num_layers > 1 else float(whole),
        hidden_size=text_config.hidden_size,
        intermediate_size=getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size,
        attention_size=heads * head_dim,
        vocab_size=text_config.vocab_size,
    )


def estimate_activation_bytes(size: ModelSize, *, num_tokens: int, dtype_bytes: int, num_heads: int = 1) -> int:
    """Estimate what a batch takes beside the weights: what a layer holds at once, and the logits of a chunk.

    Args:
        size: of the model.
        num_tokens: of the batch.
        dtype_bytes: of a number.
        num_heads: logits that exist at once: 2 for a divergence.
    """
    of_layer = num_tokens * dtype_bytes * (4 * size.hidden_size + 3 * size.intermediate_size + 2 * size.attention_size)
    return of_layer + num_heads * 3 * (64 << 20)


def measure_evaluation_rates(
    config: PretrainedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seq_len: int,
    num_windows: int,
    metric: Literal["nll", "kl"] = "nll",
) -> EvaluationRates:
    """Measure how fast windows are evaluated on a device.

    Args:
        config: of the model.
        device: to measure on.
        dtype: of the weights.
        seq_len: tokens in a window.
        num_windows: windows that a study evaluates together at most.
        metric: what is measured of a window.

    Raises:
        LpsearchError: if not even two layers fit on the device.
    """
    size = measure_model_size(config)
    depths = (1, min(3, size.num_layers)) if size.num_layers > 1 else (1, 1)
    num_heads = 2 if metric == "kl" else 1
    per_token = depths[1] * size.count_layer_flops(seq_len) + size.count_rest_flops(num_heads)
    batch_size = min(num_windows, choose_batch_size(device, seq_len))
    most_tokens = max(16, int(_MOST_FLOPS.get(device.type, _MOST_FLOPS["cpu"]) / per_token))
    batch_size = max(1, min(batch_size, most_tokens // seq_len))
    probe_len = min(seq_len, most_tokens)
    _check_memory(size, depth=depths[1], device=device, dtype=dtype)
    try:
        timings, activation_bytes = _time_depths(
            config, depths, device=device, dtype=dtype, batch_size=batch_size, seq_len=probe_len, metric=metric
        )
    except torch.OutOfMemoryError as error:
        raise LpsearchError(f"{device} ran out of memory while it was measured: {describe_error(error)}") from None
    shallow, deep = (statistics.median(times) / batch_size for times in timings)
    layer_s = max(0.0, deep - shallow) / max(1, depths[1] - depths[0])
    rest_s = shallow - depths[0] * layer_s
    if rest_s < 0:  # noise: the rest is next to nothing
        layer_s, rest_s = deep / depths[1], 0.0
    longer = seq_len / probe_len
    share = size.count_layer_flops(seq_len) / size.count_layer_flops(probe_len)
    if activation_bytes is None or longer > 1:
        activation_bytes = estimate_activation_bytes(
            size,
            num_tokens=min(num_windows, choose_batch_size(device, seq_len)) * seq_len,
            dtype_bytes=dtype.itemsize,
            num_heads=num_heads,
        )
    return EvaluationRates(layer_s * longer * share, rest_s * longer, activation_bytes, batch_size * probe_len)


def _time_depths(
    config: PretrainedConfig,
    depths: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    seq_len: int,
    metric: Literal["nll", "kl"],
) -> tuple[list[list[float]], int | None]:
    """Time one batch at each depth, in turns; return the seconds, and the bytes of activations on a GPU."""
    vocab_size = config.get_text_config(decoder=True).vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab_size, (batch_size, seq_len)).astype(np.int32)
    windows = Windows(tokens, "probe")
    timings: list[list[float]] = [[] for _ in depths]
    evaluators, activation_bytes = [], None
    for depth in depths:
        model = _build_random(_select_layers(config, range(depth)), device=device, dtype=dtype)
        evaluators.append(
            ModelEvaluator(model=model, windows=windows, metric=metric, batch_size=batch_size, cache_bytes=0)
        )

    def run(index: int) -> float:
        plan = Plan.baseline(depths[index])
        started = time.perf_counter()
        evaluators[index].evaluate_windows(plan, range(batch_size))  # ends with numbers on the host
        return time.perf_counter() - started

    for index in range(len(depths)):
        run(index)  # warm-up, and what a divergence is from
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(len(depths) - 1)
        activation_bytes = torch.cuda.max_memory_allocated(device) - before
    ends_at = time.perf_counter() + _PROBE_S
    while len(timings[0]) < _LEAST_RUNS or time.perf_counter() < ends_at:
        for index, times in enumerate(timings):
            times.append(run(index))
    return timings, activation_bytes


def _check_memory(size: ModelSize, *, depth: int, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to build what does not fit.

    Raises:
        LpsearchError: naming the bytes.
    """
    rest = size.num_parameters - size.num_layers * size.num_layer_parameters
    needed = (2 * rest + (1 + depth) * size.num_layer_parameters) * dtype.itemsize
    free = find_free_bytes(device)
    if needed > 0.8 * free:
        raise LpsearchError(
            f"{device} cannot be measured: {depth} layers of the model take {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free; name the hardware with --hardware, e.g. h100"
        )


def _select_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """Return the configuration of a model with some of the layers, spread evenly over the whole."""
    copied = copy.deepcopy(config)
    text_config: Any = copied.get_text_config(decoder=True)
    total = text_config.num_hidden_layers
    chosen = [index * total // len(layers) for index in range(len(layers))]
    for name, value in vars(text_config).items():
        if isinstance(value, list) and len(value) == total:
            setattr(text_config, name, [value[index] for index in chosen])
    text_config.num_hidden_layers = len(layers)
    return copied


def _build_on_meta(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(config) if dtype is None else build(config, dtype=dtype)
    return cast("PreTrainedModel", model)


def _build_random(config: PretrainedConfig, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Build a model with small random weights; its buffers are zero, by which it rotates nothing."""
    model: Any = _build_on_meta(config, dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
        for buffer in model.buffers():
            buffer.zero_()
    model.requires_grad_(False)
    return cast("PreTrainedModel", model.train(False))
