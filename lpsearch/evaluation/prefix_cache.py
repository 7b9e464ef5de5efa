"""Running a plan from the longest beginning that an earlier plan shared: hidden states kept at group boundaries.

The model runs its own ordinary forward. Layers before the boundary get a ``forward`` that returns its input, the last
of them one that returns the kept hidden states, so embedding, masks, rotary embeddings, final norm and head stay the
model's own whatever its family, and every layer that does run sees the same bits as in a whole run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lpsearch.evaluation.losses import RAW, Variant
from lpsearch.evaluation.prefix_tree import Boundary, PrefixTree
from lpsearch.models.families import get_decoder_layers
from lpsearch.models.forwards import replaced_forwards
from lpsearch.models.memory import find_free_bytes
from lpsearch.models.placement import find_input_device, find_run_device, place_beside
from lpsearch.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CacheUsage", "PrefixCache", "choose_cache_bytes"]

_logger = logging.getLogger(__name__)

_DEVICE_SHARE = 0.5
"""Share of the free device memory: the rest is for activations, logits and what the user starts beside it."""

_HOST_SHARE = 0.25
_MAX_CPU_BYTES = 2 << 30


@dataclass(frozen=True)
class CacheUsage:
    """What a prefix cache saved and holds.

    Attributes:
        layers_run: decoder layers that ran, one layer on one window counted once.
        layers_asked: decoder layers that the same evaluations run without a cache.
        num_boundaries: states held, each of one batch.
        held_bytes: bytes of these states.
        budget_bytes: most bytes to hold.
    """

    layers_run: int = 0
    layers_asked: int = 0
    num_boundaries: int = 0
    held_bytes: int = 0
    budget_bytes: int = 0


def choose_cache_bytes(*devices: torch.device, location: Literal["device", "host"] = "device") -> int:
    """Choose a budget: half of the free memory of a GPU; of a machine's own a quarter, with a CPU model at most 2 GiB.

    Args:
        devices: where the model is, loaded; of one that is spread, those that it runs on, the least free of which
            decides, for which states are kept beside their layers.
        location: where the states are to be kept.
    """
    is_cuda = devices[0].type == "cuda"
    if is_cuda and location == "device":
        return int(_DEVICE_SHARE * min(map(find_free_bytes, devices)))
    available_bytes = int(_HOST_SHARE * find_free_bytes(torch.device("cpu")))
    return available_bytes if is_cuda else min(_MAX_CPU_BYTES, available_bytes)


class PrefixCache:
    """Hidden states of one model at the group boundaries of the plans that it ran.

    The states are those of the weights that computed them, by variant; after any other change of weights call
    :meth:`clear`. Nothing is
    copied to keep a state on the device: it is the very tensor that a layer returned, which no layer of a family that
    passed :func:`~lpsearch.models.check_family` writes to.

    Args:
        model: the model, under whichever plan it is to run.
        budget_bytes: most bytes of states to keep; 0 keeps none.
        location: ``device`` beside the weights, ``host`` in pinned memory, copied while the next layers run. For a
            model on the CPU they are the same.
    """

    def __init__(
        self, *, model: PreTrainedModel, budget_bytes: int, location: Literal["device", "host"] = "device"
    ) -> None:
        """Begin empty."""
        self._model = model
        self._tree: PrefixTree[Tensor] = PrefixTree(budget_bytes=budget_bytes)
        self._hidden_size = int(model.config.get_text_config().hidden_size)
        self._device = find_input_device(model)
        copied = location == "host" and self._device.type == "cuda"
        self._copies: dict[torch.device, torch.cuda.Stream] | None = {} if copied else None
        self._counts = CacheUsage()

    def list_states(self) -> list[Tensor]:
        """Return the hidden states that are kept, not copied."""
        return self._tree.list_states()

    @property
    def usage(self) -> CacheUsage:
        """What was saved so far and what is held now."""
        return replace(
            self._counts,
            num_boundaries=len(self._tree),
            held_bytes=self._tree.held_bytes,
            budget_bytes=self._tree.budget_bytes,
        )

    def clear(self, *, budget_bytes: int | None = None) -> None:
        """Forget every state.

        Args:
            budget_bytes: a new budget; None leaves it.
        """
        self._tree.clear(budget_bytes=budget_bytes)

    def halve(self) -> bool:
        """Make room after the device ran out of memory; false if there was nothing to give."""
        held_bytes = self._tree.held_bytes
        if self._copies is not None or not held_bytes:
            return False
        self.clear(budget_bytes=held_bytes // 2)
        _logger.warning(
            "%s ran out of memory; the prefix cache keeps at most %.1f GiB from now on",
            self._device,
            held_bytes / 2 / 2**30,
        )
        return True

    @contextmanager
    def shortcut(self, plan: Plan, batch: Sequence[int], *, seq_len: int, variant: Variant = RAW) -> Iterator[None]:
        """Let one forward of the block run only the groups after the plan's longest kept beginning.

        Args:
            plan: the plan that is applied to the model.
            batch: the windows that run together, which name the batch: the same windows in the same order are the
                same batch, with the same bits.
            seq_len: tokens of each window.
            variant: what was done to the weights; states of two variants never mix.
        """
        layers = list(get_decoder_layers(self._model))
        state_bytes = len(batch) * seq_len * self._hidden_size * self._model.dtype.itemsize
        # A group of which nothing is left changes how the one before it is repaired, so the two are one step.
        groups = plan.running_groups
        with self._tree.visit((variant, *batch), groups, state_bytes=state_bytes) as visit, ExitStack() as stack:
            num_skipped = 0
            if visit.resume is not None and visit.state is not None:
                num_skipped = visit.resume.num_layers
                next_layer = layers[min(num_skipped, len(layers) - 1)]
                stack.enter_context(_skipping(layers[:num_skipped], self._load(visit.state, next_layer)))
            for boundary in visit.keep:
                hook = _Keep(self, boundary)
                stack.enter_context(_hooked(layers[boundary.num_layers - 1], hook))
            yield
        self._counts = replace(
            self._counts,
            layers_run=self._counts.layers_run + (len(layers) - num_skipped) * len(batch),
            layers_asked=self._counts.layers_asked + len(layers) * len(batch),
        )

    def keep(self, boundary: Boundary[Tensor], hidden_states: Tensor) -> None:
        """Keep the hidden states ``(batch, seq, hidden)`` at a boundary that a visit asked for."""
        if self._copies is not None:
            host = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, pin_memory=True)
            stream = self._get_stream(self._copies, hidden_states.device)
            stream.wait_stream(torch.cuda.current_stream(hidden_states.device))
            with torch.cuda.stream(stream):
                host.copy_(hidden_states, non_blocking=True)
            hidden_states.record_stream(stream)
            hidden_states = host
        self._tree.hold(boundary, hidden_states, nbytes=hidden_states.nbytes)

    def _load(self, state: Tensor, layer: nn.Module) -> Tensor:
        """Return a state where the layer that reads it runs."""
        if self._copies is None:
            return place_beside(layer, state)
        device = find_run_device(layer) or self._device
        for stream in self._copies.values():  # the copy to the host may have been on any
            torch.cuda.current_stream(device).wait_stream(stream)
        return state.to(device, non_blocking=True)

    @staticmethod
    def _get_stream(streams: dict[torch.device, torch.cuda.Stream], device: torch.device) -> torch.cuda.Stream:
        """Return the stream that copies from a device."""
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return streams[device]


@dataclass(frozen=True, eq=False)
class _Keep:
    """Forward hook of the last layer of a group: keeps what it returns."""

    cache: PrefixCache
    boundary: Boundary[Tensor]

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.cache.keep(self.boundary, output)


@contextmanager
def _hooked(layer: nn.Module, hook: _Keep) -> Iterator[None]:
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _skipping(layers: Sequence[nn.Module], hidden_states: Tensor) -> AbstractContextManager[None]:
    """Let layers return their input, and the last of them ``hidden_states``."""

    def skip(hidden_states: Tensor, **layer_kwargs: Any) -> Tensor:
        return hidden_states

    return replaced_forwards(layers, [*[skip] * (len(layers) - 1), lambda _, **layer_kwargs: hidden_states])
