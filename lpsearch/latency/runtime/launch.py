"""Launching kernels: whether they run on a device, and starting one while the one before it ends.

With programmatic dependent launch a kernel asks for its first weights while the kernel before it still runs, and waits
before it reads what that one wrote (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization";
PTX ``griddepcontrol``; compute capability 9.0 and later).
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for the CPU alone come without it
    triton = None

__all__ = ["dependent_launch", "has_kernels", "release", "wait"]


def has_kernels(device: torch.device) -> bool:
    """Tell whether the kernels run on a device."""
    return triton is not None and device.type == "cuda"


def dependent_launch() -> dict[str, bool]:
    """Return the options that let a kernel start while the one before it ends (compute capability 9 and later)."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


if triton is not None:

    @triton.jit
    def wait(PDL: tl.constexpr):
        """Wait for the kernel before this one to end."""
        if PDL:
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def release(PDL: tl.constexpr):
        """Let the kernel behind this one start."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
