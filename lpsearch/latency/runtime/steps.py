"""Steps of a workload by this package's decoder, for the measuring loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lpsearch.latency.runtime.decoder import RunMode, default_mode
from lpsearch.latency.runtime.shaped import ShapedDecoders
from lpsearch.latency.runtime.weights import count_cache_elements, count_weight_elements
from lpsearch.latency.sums import Ranks
from lpsearch.latency.workload import Step, Workload
from lpsearch.models.traits import FamilyTraits
from lpsearch.plan import Plan

__all__ = ["RuntimeSteps"]

_RUNTIMES: dict[RunMode, str] = {
    "eager": "wide layers, eager",
    "graph": "wide layers, captured graph",
    "compiled": "wide layers, fused kernels, captured graph",
}


class RuntimeSteps:
    """A :class:`lpsearch.latency.workload.StepBuilder`: groups as wide layers, in the fastest mode of the device.

    Args:
        traits: shape of the model.
        workload: what is timed.
        device: where to run.
        dtype: of weights and cache.
        ranks: the ranks that share the model.

    Raises:
        FamilyError: for a model that the runtime does not compute.
        ConfigError: if the ranks do not divide the model.
    """

    fuses = True
    shares_memory = True

    def __init__(
        self, traits: FamilyTraits, workload: Workload, *, device: torch.device, dtype: torch.dtype, ranks: Ranks
    ) -> None:
        traits.check_runtime()
        traits.check_ranks(ranks.num_ranks)
        self.ranks = ranks
        mode = default_mode(device)
        self.modes: tuple[RunMode, ...] = (mode,) if mode == "eager" else (mode, "eager", "graph")
        self.runtime = _RUNTIMES[mode]
        baseline = Plan.baseline(traits.num_layers)
        self.layer_elements = count_weight_elements(traits, baseline, ranks.num_ranks) // traits.num_layers
        self.token_elements = count_cache_elements(traits, batch_size=1, capacity=1, num_ranks=ranks.num_ranks)
        self._traits, self._workload = traits, workload
        self._device, self._dtype = device, dtype

    def reserve(self, num_layers: int) -> None:
        """Take the memory of so many layers."""
        self._shaped = ShapedDecoders(
            self._traits,
            num_layers=num_layers,
            batch_size=self._workload.batch_size,
            capacity=self._workload.context_len + 1,
            device=self._device,
            dtype=self._dtype,
            ranks=self.ranks,
        )

    def build(self, plan: Plan, layers: Sequence[int], mode: RunMode) -> Step:
        """Build a decode step at the workload's length, or a prefill of its prompt."""
        num_tokens = self._workload.context_len
        if self._workload.kind == "prefill":
            decoder = self._shaped.build(plan, length=0, mode=mode, layers=layers)
            return Step(self._shaped.build_prefill(decoder, num_tokens=num_tokens))
        decoder = self._shaped.build(plan, length=num_tokens, mode=mode, layers=layers)
        if mode != "eager":
            decoder.capture_fastest()
        return Step(decoder.run_step, decoder.count_step_bytes())

    def close(self) -> None:
        """Do nothing: what a decoder holds goes with it."""
