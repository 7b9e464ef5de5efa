"""Letting modules run something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["replaced_forwards"]


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let modules call other functions in place of their ``forward`` within a ``with`` block.

    Afterwards each has what it had: its class's, or one of its own, e.g. set by accelerate.

    Args:
        modules: each once.
        forwards: one a module; called without the module itself.
    """
    own = [module.__dict__.get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
