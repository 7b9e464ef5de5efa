"""Hardware that a dry run can be made for: the machine that it runs on, or GPUs by name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lpsearch.errors import ConfigError

__all__ = ["GPUS", "Hardware", "parse_hardware"]


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        memory_gib: GiB that a program finds free.
        bf16_tflops: dense bfloat16 products, in 10^12 operations a second.
        fp32_tflops: float32 without TF32.
    """

    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float


GPUS = {
    "a100-40gb": Gpu(39.0, 312, 19.5),
    "a100-80gb": Gpu(78.5, 312, 19.5),
    "a10g": Gpu(22.0, 70, 31),
    "b200": Gpu(178.0, 2250, 75),
    "h100": Gpu(78.5, 989, 67),
    "h200": Gpu(139.0, 989, 67),
    "l4": Gpu(22.0, 121, 30),
    "l40s": Gpu(44.0, 362, 91),
    "rtx-4090": Gpu(23.0, 165, 82),
}
"""By name, from NVIDIA's data sheets (SXM where there are several)."""

SHARE_OF_PEAK = {"bfloat16": 0.28, "float16": 0.28, "float32": 0.7}
"""Share of the data sheet's rate that a search reaches; in bfloat16 that of the shape of Llama 2 7B on an H100
(studies/RESULTS.md: 259 TFLOP/s with everything around the products). In float32 it is a guess."""


@dataclass(frozen=True)
class Hardware:
    """GPUs of one host.

    Attributes:
        name: as it was named, e.g. ``2xh100``.
        num_gpus: how many.
        gpu: one of them.
    """

    name: str
    num_gpus: int
    gpu: Gpu

    def get_flops_per_s(self, dtype: str) -> float:
        """Return the operations a second that are reached in a dtype by one of them."""
        peak = self.gpu.fp32_tflops if dtype == "float32" else self.gpu.bf16_tflops
        return SHARE_OF_PEAK[dtype] * peak * 1e12


def parse_hardware(text: str) -> Hardware:
    """Parse GPUs by name, e.g. ``h100`` or ``8xa100-80gb``.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(?:(\d{1,3})x)?([a-z0-9-]+)", text.strip().lower())
    gpu = GPUS.get(match[2]) if match else None
    if match is None or gpu is None or match[1] in ("0", "00", "000"):
        raise ConfigError(
            f"--hardware {text!r} is not known; give {', '.join(GPUS)}, with a number before it for several, e.g. "
            "2xh100, or leave it out to measure this machine"
        )
    return Hardware(text.strip().lower(), int(match[1] or 1), gpu)
