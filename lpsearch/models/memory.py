"""How much memory a device has left."""

from __future__ import annotations

import psutil
import torch

__all__ = ["find_free_bytes"]


def find_free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device; on a GPU, torch may hold some that it does not use."""
    if device.type == "cuda":
        unused_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused_bytes
    return int(psutil.virtual_memory().available)
