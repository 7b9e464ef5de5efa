"""What is timed: workloads, and the interface of what builds their steps.

This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lpsearch.errors import ConfigError
from lpsearch.plan import Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lpsearch.latency.sums import Ranks

__all__ = ["Step", "StepBuilder", "Workload", "check_workloads", "format_mix", "limit_context", "parse_mix"]

_MAX_DIGITS = 12
"""Of a number of sequences or tokens; no machine holds more."""


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        kind: ``decode`` or ``prefill``.
        batch_size: sequences together.
        context_len: cached tokens of each sequence, or the tokens of its prompt.
    """

    kind: Literal["decode", "prefill"]
    batch_size: int
    context_len: int

    @property
    def spec(self) -> str:
        """The workload as ``--workload`` takes it, e.g. ``decode:1x1024`` or ``prefill:2048``."""
        is_prompt = self.kind == "prefill" and self.batch_size == 1
        return f"{self.kind}:{'' if is_prompt else f'{self.batch_size}x'}{self.context_len}"


def parse_mix(texts: Iterable[str]) -> dict[Workload, float]:
    """Parse a mix of workloads, e.g. ``decode:1x1024,decode:64x4096,prefill:2048@2``.

    Args:
        texts: each one or several workloads between commas: ``decode:SEQUENCESxTOKENS``, ``prefill:TOKENS`` or
            ``prefill:SEQUENCESxTOKENS``, and after ``@`` the weight, 1 by default.

    Returns:
        The weight of each workload, in order; they add up to 1.

    Raises:
        ConfigError: for anything else.
    """
    weights: dict[Workload, float] = {}
    for text in (part.strip() for joined in texts for part in joined.split(",")):
        workload, weight = _parse_workload(text)
        if workload in weights:
            raise ConfigError(f"--workload {text}: {workload.spec} is named twice; give it once, with its weight")
        weights[workload] = weight
    total = sum(weights.values())
    return {workload: weight / total for workload, weight in weights.items()}


def format_mix(mix: Mapping[Workload, float]) -> str:
    """Write a mix in one way, whatever words it was given in: ``decode:1x1024@0.5,prefill:2048@0.5``."""
    return ",".join(f"{workload.spec}@{weight:.4g}" for workload, weight in mix.items())


def _parse_workload(text: str) -> tuple[Workload, float]:
    """Parse a workload and its weight."""
    named, at, weight_text = text.partition("@")
    kind, _, numbers = named.partition(":")
    parts = numbers.split("x")
    if kind == "prefill" and len(parts) == 1:
        parts = ["1", *parts]
    are_numbers = all(part.isascii() and part.isdigit() and len(part) <= _MAX_DIGITS for part in parts)
    least = 0 if kind == "decode" else 1
    if (
        kind not in ("decode", "prefill")
        or len(parts) != 2
        or not are_numbers
        or int(parts[0]) < 1
        or int(parts[1]) < least
    ):
        raise ConfigError(
            f"--workload {text}: expected decode:SEQUENCESxTOKENS or prefill:TOKENS, and @WEIGHT if wanted, e.g. "
            "decode:64x4096 or prefill:2048@0.5"
        )
    try:
        weight = float(weight_text) if at else 1.0
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"--workload {text}: the weight {weight_text!r} is no positive number")
    return Workload("decode" if kind == "decode" else "prefill", int(parts[0]), int(parts[1])), weight


def limit_context(config: PretrainedConfig, context_len: int) -> int:
    """Return so many cached tokens, or as many as a model reads beside the one that is decoded."""
    from lpsearch.models import find_max_positions  # which needs torch

    longest = find_max_positions(config)
    return context_len if longest is None else min(context_len, longest - 1)


def check_workloads(config: PretrainedConfig, workloads: Sequence[Workload]) -> None:
    """Refuse workloads of more tokens than a model reads, before anything is measured.

    Raises:
        ConfigError: naming the option that sets the tokens.
    """
    from lpsearch.models import find_max_positions  # which needs torch

    longest = find_max_positions(config)
    if longest is None:
        return
    for workload in workloads:
        if workload.kind == "decode" and workload.context_len >= longest:
            raise ConfigError(
                f"--context {workload.context_len}: the model reads at most {longest} tokens, the one that is decoded "
                f"included; give at most {longest - 1}"
            )
        if workload.kind == "prefill" and workload.context_len > longest:
            raise ConfigError(f"--prefill {workload.context_len}: the model reads at most {longest} tokens")


@dataclass(frozen=True)
class Step:
    """One workload under one plan, ready to run again and again.

    Attributes:
        run: a decode step, or a prefill; it leaves the device as it found it.
        read_bytes: bytes that a decode step must read on one rank; None where that is not known, or for a prefill.
    """

    run: Callable[[], Any]
    read_bytes: int | None = None


class StepBuilder(Protocol):
    """Builds the steps of one workload under many plans, which share memory and run in turn.

    There are two: :class:`lpsearch.latency.runtime.steps.RuntimeSteps`, this package's decoder, and
    :class:`lpsearch.latency.fallback.TransformersSteps` for families that the runtime does not compute.
    """

    @property
    def runtime(self) -> str:
        """What executes the steps, as the profile says it."""

    @property
    def modes(self) -> Sequence[str]:
        """Ways of running the unmodified model; plans are timed in the first."""

    @property
    def fuses(self) -> bool:
        """Whether a group runs as one wide layer; if not, it costs what its layers cost."""

    @property
    def ranks(self) -> Ranks:
        """The ranks that share the model."""

    @property
    def layer_elements(self) -> int:
        """Elements of one layer's weights on a rank."""

    @property
    def token_elements(self) -> int:
        """Elements of one layer's keys and values of one token on a rank."""

    def reserve(self, num_layers: int) -> None:
        """Take the memory of so many layers of the model, before the first step is built."""

    def build(self, plan: Plan, layers: Sequence[int], mode: Any) -> Step:
        """Build a step.

        Args:
            plan: groups over the layers.
            layers: layers of the model that the plan is over, in any order and more than once if wanted.
            mode: one of ``modes``.
        """
