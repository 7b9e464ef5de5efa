"""The operations of a decoder step: plain torch, and the same fused.

A row is one token of one sequence. Fused, a norm, activation, bias or residual becomes part of the product beside it:
by kernels of this package where there is one row, else by torch.compile around the library's products. Fused and plain
agree but for rounding; on a CPU everything is plain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lpsearch.latency.runtime import kernels

__all__ = ["Operations"]

Activation = Literal["silu", "gelu_tanh"]


class Operations:
    """Products of the decoder with what is computed around them.

    Args:
        fused: whether to fuse; needs a CUDA device.
        eps: epsilon of the norms.
        activation: of the gate.
    """

    def __init__(self, *, fused: bool, eps: float, activation: Activation) -> None:
        """Choose the implementation."""
        self.fused = fused
        self._eps = eps
        self._activation: Activation = activation

    def project(self, rows: Tensor, weight: Tensor, bias: Tensor | None, *, norm: bool) -> Tensor:
        """Norm rows without a weight if asked, and multiply.

        Args:
            rows: (rows, in).
            weight: (out, in).
            bias: (out,).
            norm: whether an RMSNorm, whose weight is folded into ``weight``, comes before.

        Returns:
            (rows, out).
        """
        if self.fused and len(rows) == 1:
            return kernels.multiply_row(rows, weight[None], bias, norm_eps=self._eps if norm else None)[0]
        return _call(_project, self.fused)(rows, weight, bias, self._eps if norm else None)

    def gate(self, rows: Tensor, weight: Tensor, bias: Tensor | None, *, norm: bool) -> Tensor:
        """Compute activation(gate) * up of rows.

        Args:
            rows: (rows, in).
            weight: (2 x inner, in), the gates' rows first.
            bias: (2 x inner,).
            norm: as in :meth:`project`.

        Returns:
            (rows, inner).
        """
        eps = self._eps if norm else None
        if self.fused and len(rows) == 1:
            return kernels.multiply_row(rows, weight[None], bias, norm_eps=eps, activation=self._activation)[0]
        return _call(_gate, self.fused)(rows, weight, bias, eps, self._activation)

    def output(self, rows: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """Multiply rows by output projections and add a residual.

        Args:
            rows: (rows, P x in).
            weight: (P, out, in).
            bias: (P, out).
            residual: (rows, out), with P = 1 only.

        Returns:
            (P, rows, out).
        """
        if self.fused and len(rows) == 1:
            return kernels.multiply_row(rows.view(len(weight), -1), weight, bias, residual=residual)
        return _call(_output, self.fused)(rows, weight, bias, residual)

    def add_normed(self, residual: Tensor, outputs: Tensor, weight: Tensor) -> Tensor:
        """Add outputs, each with its own RMSNorm, to the residual.

        Args:
            residual: (rows, hidden).
            outputs: (P, rows, hidden).
            weight: (P, hidden).

        Returns:
            (rows, hidden).
        """
        return _call(_add_normed, self.fused)(residual, outputs, weight, self._eps)


def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float | None) -> Tensor:
    return F.linear(_norm(rows, eps), weight, bias)


def _gate(rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float | None, activation: Activation) -> Tensor:
    gate, up = F.linear(_norm(rows, eps), weight, bias).chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def _output(rows: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if len(weight) == 1:
        out = F.linear(rows, weight[0], None if bias is None else bias[0])
        return (out if residual is None else residual + out)[None]
    members = rows.view(len(rows), len(weight), -1).transpose(0, 1)  # (P, rows, in)
    out = torch.bmm(members, weight.transpose(1, 2))
    return out if bias is None else out + bias[:, None]


def _add_normed(residual: Tensor, outputs: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = _norm(outputs.float(), eps) * weight[:, None].float()  # (P, rows, hidden)
    return (residual.float() + normed.sum(0)).to(residual.dtype)


def _norm(rows: Tensor, eps: float | None) -> Tensor:
    return rows if eps is None else F.rms_norm(rows, rows.shape[-1:], eps=eps)


def _call(function: Callable[..., Tensor], fused: bool) -> Callable[..., Tensor]:
    return _compile(function) if fused else function


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function once a shape; the weights are arguments, so that layers of one shape share the code."""
    # Shapes differ by projection and by group size: more of them than the default limit allows for one function.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 4096)
    return torch.compile(function, dynamic=False, fullgraph=True)
