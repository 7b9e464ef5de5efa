"""Steps in llama.cpp, through the server that ``xllamacpp`` binds: one sequence, a float16 cache, its own clock.

Each plan is a GGUF file with random weights in a temporary directory, and a server of its own in this process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lpsearch.errors import ConfigError, FamilyError
from lpsearch.latency.engines.shapes import choose_generation, count_layer_elements, select_config
from lpsearch.latency.engines.timing_file import write_timing_file
from lpsearch.latency.sums import OneRank
from lpsearch.latency.workload import Step, Workload
from lpsearch.models.traits import FamilyTraits, read_traits
from lpsearch.plan import Plan
from lpsearch.transform.deci import find_deci_obstacle

__all__ = ["LlamaCppSteps", "check_llama_cpp_device", "check_llama_cpp_family"]

_MODE = "llama.cpp"
_SPARE_TOKENS = 64  # of the context, beyond what a call takes


def check_llama_cpp_device(device: torch.device) -> None:
    """Refuse a GPU that the installed build does not use.

    Raises:
        ConfigError: if it was built for CPUs alone.
    """
    import xllamacpp

    if device.type != "cpu" and not any("GPU" in str(found["type"]) for found in xllamacpp.get_device_info()):
        raise ConfigError(
            f"--engine llama.cpp: the installed xllamacpp has no backend for {device.type}; give --device cpu, or "
            "install a build with one"
        )


def check_llama_cpp_family(traits: FamilyTraits) -> None:
    """Refuse a model that llama.cpp would compute otherwise, as ``lpsearch export`` does.

    Raises:
        FamilyError: with the reason.
    """
    obstacle = find_deci_obstacle(traits)
    if obstacle is not None:
        raise FamilyError(
            f"--engine llama.cpp: model type {traits.config.model_type} is not timed there: {obstacle}. Give --engine "
            "runtime, transformers or vllm"
        )


class LlamaCppSteps:
    """A :class:`lpsearch.latency.workload.StepBuilder`: completions of llama.cpp's server.

    Args:
        traits: of a model that :func:`check_llama_cpp_family` lets pass.
        workload: what is timed: one sequence.
        device: where to run; all layers go there.
        dtype: of the weights.
    """

    modes = (_MODE,)
    ranks = OneRank()
    fuses = True
    shares_memory = False
    runtime = "server, float16 cache"

    def __init__(self, traits: FamilyTraits, workload: Workload, *, device: torch.device, dtype: torch.dtype) -> None:
        self._config = traits.config
        self._generation = choose_generation(workload)
        self._device, self._dtype = device, dtype
        self.layer_elements = count_layer_elements(traits)
        self.token_elements = 2 * traits.num_kv_heads * traits.head_dim
        self._directory: TemporaryDirectory[str] | None = None
        self._servers: list[Any] = []

    def reserve(self, num_layers: int) -> None:
        """Make the directory of the files; each plan takes its own memory."""
        self._directory = TemporaryDirectory(prefix="lpsearch-llama-cpp-")

    def build(self, plan: Plan, layers: Sequence[int], mode: str = _MODE) -> Step:
        """Write the file of a plan, start its server and run it once.

        Raises:
            OSError: if the file cannot be written.
        """
        assert self._directory is not None, "reserve comes first"
        path = Path(self._directory.name) / f"{len(self._servers)}.gguf"
        write_timing_file(read_traits(select_config(self._config, layers)), plan, path, dtype=self._dtype)
        server = self._start(path)
        self._servers.append(server)
        generation = self._generation
        request = {
            "prompt": generation.prompt,
            "n_predict": generation.num_new_tokens,
            "cache_prompt": generation.num_steps > 0,  # a prompt that is timed is read anew
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "stream": False,
        }

        def run() -> float:
            timings = _complete(server, request)["timings"]
            if not generation.num_steps:
                return float(timings["prompt_ms"])
            assert timings["predicted_n"] == generation.num_new_tokens, "llama.cpp stopped early"
            return float(timings["predicted_ms"]) / generation.num_steps  # from the first token to the last

        run()
        return Step(run, is_clocked=True)

    def close(self) -> None:
        """Stop the servers and remove the files."""
        self._servers.clear()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _start(self, path: Path) -> Any:
        """Start a server on a file, with as many threads as torch has."""
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = self._generation.num_tokens + _SPARE_TOKENS
        parameters.n_parallel = 1
        parameters.n_gpu_layers = 0 if self._device.type == "cpu" else 1 << 16
        parameters.cpuparams.n_threads = torch.get_num_threads()
        parameters.cpuparams_batch.n_threads = torch.get_num_threads()
        parameters.warmup = False
        parameters.verbosity = -1
        return xllamacpp.Server(parameters)


def _complete(server: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a server's answer to a completion request."""
    answer: Any = server.handle_completions(dict(request))
    document: dict[str, Any] = json.loads(answer) if isinstance(answer, str | bytes) else answer
    if "timings" not in document:
        raise RuntimeError(f"llama.cpp did not complete: {document}")
    return document
