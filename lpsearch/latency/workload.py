"""What is timed: workloads, and the interface of what builds their steps.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lpsearch.errors import ConfigError
from lpsearch.latency.mix import Workload
from lpsearch.plan import Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lpsearch.latency.sums import Ranks

__all__ = ["Step", "StepBuilder", "Workload", "check_workloads", "limit_context"]


def limit_context(config: PretrainedConfig, context_len: int) -> int:
    """Return so many cached tokens, or as many as a model reads beside the one that is decoded."""
    from lpsearch.models import find_max_positions  # which needs torch

    longest = find_max_positions(config)
    return context_len if longest is None else min(context_len, longest - 1)


def check_workloads(config: PretrainedConfig, workloads: Sequence[Workload], *, are_named: bool = False) -> None:
    """Refuse workloads of more tokens than a model reads, before anything is measured.

    Args:
        config: the model's configuration.
        workloads: what is to be measured.
        are_named: whether ``--workload`` names them, and not ``--context`` and ``--prefill``.

    Raises:
        ConfigError: naming the option that sets the tokens.
    """
    from lpsearch.models import find_max_positions  # which needs torch

    longest = find_max_positions(config)
    if longest is None:
        return
    for workload in workloads:
        option = f"--{'context' if workload.kind == 'decode' else 'prefill'} {workload.context_len}"
        option = f"--workload {workload.spec}" if are_named else option
        if workload.kind == "decode" and workload.context_len >= longest:
            raise ConfigError(
                f"{option}: the model reads at most {longest} tokens, the one that is decoded "
                f"included; give at most {longest - 1}"
            )
        if workload.kind == "prefill" and workload.context_len > longest:
            raise ConfigError(f"{option}: the model reads at most {longest} tokens")


@dataclass(frozen=True)
class Step:
    """One workload under one plan, ready to run again and again.

    Attributes:
        run: a decode step, or a prefill; it leaves the device as it found it.
        read_bytes: bytes that a decode step must read on one rank; None where that is not known, or for a prefill.
        is_clocked: whether ``run`` times itself: it returns the mean time in milliseconds of one of the decode steps
            that it ran, or of its prefill, and may do other work beside them.
    """

    run: Callable[[], Any]
    read_bytes: int | None = None
    is_clocked: bool = False


class StepBuilder(Protocol):
    """Builds the steps of one workload under many plans, which share memory and run in turn.

    The engine ``runtime`` has two: :class:`lpsearch.latency.runtime.steps.RuntimeSteps`, this package's decoder, and
    :class:`lpsearch.latency.fallback.TransformersSteps` for families that the runtime does not compute. Every other
    engine has one, in :mod:`lpsearch.latency.engines`.
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

    @property
    def shares_memory(self) -> bool:
        """Whether plans share one model's memory; if not, each holds its own until :meth:`close`."""

    def reserve(self, num_layers: int) -> None:
        """Take the memory of so many layers of the model, before the first step is built."""

    def build(self, plan: Plan, layers: Sequence[int], mode: Any) -> Step:
        """Build a step.

        Args:
            plan: groups over the layers.
            layers: layers of the model that the plan is over, in any order and more than once if wanted.
            mode: one of ``modes``.
        """

    def close(self) -> None:
        """Give back what the steps hold; none of them runs again."""
