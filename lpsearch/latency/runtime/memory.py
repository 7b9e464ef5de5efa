"""One block of device memory that several models use in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Workspace", "align_elements"]

_ALIGNMENT = 64  # elements; keeps every weight on the address boundary that a fresh allocation would have
_FILL_BLOCK = 1 << 20


class Workspace:
    """One block of device memory whose parts stand for weights or caches of several models that run in turn.

    Depths of one model share a workspace: each reads as many bytes as it would alone, and all together occupy only one
    model's memory. It holds small random values, since zeros and denormal numbers may take another time.
    """

    def __init__(self, *, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._block = torch.empty(num_elements, dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(0)
        values = (torch.randn(min(_FILL_BLOCK, num_elements), generator=generator) * 0.02).to(
            device=device, dtype=dtype
        )
        for start in range(0, num_elements, len(values)):
            part = self._block[start : start + len(values)]
            part.copy_(values[: len(part)])
        self._used = 0

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        return self._block.device

    def rewind(self) -> None:
        """Begin again from the start: what follows belongs to another model."""
        self._used = 0

    def take(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the next part, of the given shape.

        Raises:
            RuntimeError: if the workspace is too small.
        """
        start, stop = self._used, self._used + align_elements(torch.Size(shape).numel())
        if stop > len(self._block):
            raise RuntimeError(f"a workspace of {len(self._block)} elements is too small for {stop}")
        self._used = stop
        return self._block[start : start + torch.Size(shape).numel()].view(*shape)


def align_elements(num_elements: int) -> int:
    """Return the elements that a tensor of so many takes in a workspace, padding included."""
    return -(-num_elements // _ALIGNMENT) * _ALIGNMENT
