"""What a plan saves in time: measured at a few depths, fitted, estimated for every plan.

The names below are imported on first use, so that estimating from a profile needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpsearch.latency.measure import measure_profile
    from lpsearch.latency.mix import Workload
    from lpsearch.latency.model import LatencyModel
    from lpsearch.latency.profile import LatencyProfile, check_profile_geometry, load_profile, save_profile
    from lpsearch.latency.ranks.measuring import emulate_profile_on_ranks, measure_profile_on_ranks
    from lpsearch.latency.reuse import measure_or_reuse_profile
    from lpsearch.latency.runtime.decoder import Decoder, build_decoder

__all__ = [
    "Decoder",
    "LatencyModel",
    "LatencyProfile",
    "Workload",
    "build_decoder",
    "check_profile_geometry",
    "emulate_profile_on_ranks",
    "load_profile",
    "measure_or_reuse_profile",
    "measure_profile",
    "measure_profile_on_ranks",
    "save_profile",
]

_MODULE_OF = {
    "Decoder": "runtime.decoder",
    "LatencyModel": "model",
    "LatencyProfile": "profile",
    "Workload": "mix",
    "build_decoder": "runtime.decoder",
    "check_profile_geometry": "profile",
    "emulate_profile_on_ranks": "ranks.measuring",
    "load_profile": "profile",
    "measure_or_reuse_profile": "reuse",
    "measure_profile": "measure",
    "measure_profile_on_ranks": "ranks.measuring",
    "save_profile": "profile",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lpsearch.latency.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
