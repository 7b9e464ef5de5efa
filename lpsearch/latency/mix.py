"""What is timed: one workload, or a mix of several, as the command line says it.

This module imports no torch, and nothing that does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lpsearch.errors import ConfigError

__all__ = ["Workload", "format_mix", "parse_mix"]

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
