"""Capturing a function's kernels as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["capture_graph"]

_WARM_UP_STEPS = 3


def capture_graph(function: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Run a function a few times on a side stream, as capturing asks for, then capture it.

    Args:
        function: its inputs and outputs keep their addresses.
        pool: memory pool to share with graphs that never run at the same time.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_STEPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()
    return graph
