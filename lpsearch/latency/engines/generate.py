"""Steps in transformers as people run it: ``generate`` with a static cache and a compiled decode step.

A plan runs as the checkpoint that ``lpsearch export`` writes would, the unmodified model as the family's own class.
Weights are random and shared by all plans.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, LogitsProcessor, LogitsProcessorList, StaticCache

from lpsearch.latency.engines.shapes import (
    Generation,
    build_plan_config,
    changes_nothing,
    choose_generation,
    count_layer_elements,
)
from lpsearch.latency.runtime.memory import Workspace, align_elements
from lpsearch.latency.sums import OneRank
from lpsearch.latency.workload import Step, Workload
from lpsearch.models.traits import FamilyTraits
from lpsearch.plan import Plan
from lpsearch.transform import modeling_lpsearch as modeling

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["GenerateSteps"]

_MODE = "generate"
_MAX_COMPILED = 256
"""Models whose compiled step torch may keep; its own limit of 8 would run all later plans uncompiled."""


class GenerateSteps:
    """A :class:`lpsearch.latency.workload.StepBuilder`: ``generate`` of transformers' own and of fused models.

    Args:
        traits: of a model whose groups can be fused.
        workload: what is timed; at least one cached token.
        device: where to run.
        dtype: of weights and cache.
    """

    modes = (_MODE,)
    ranks = OneRank()
    fuses = True
    shares_memory = True
    runtime = "generate, static cache, compiled step"

    def __init__(self, traits: FamilyTraits, workload: Workload, *, device: torch.device, dtype: torch.dtype) -> None:
        self._config: Any = traits.config
        self._batch_size, self._generation = workload.batch_size, choose_generation(workload)
        self._device, self._dtype = device, dtype
        self.layer_elements = count_layer_elements(traits)
        # A cache is filled before its memory becomes that of all: two of them are there for a moment.
        self.token_elements = 2 * 2 * traits.num_kv_heads * traits.head_dim
        self._cache_elements = self._batch_size * self._generation.num_tokens * traits.num_kv_heads * traits.head_dim
        self._end_elements = align_elements(traits.vocab_size * traits.hidden_size)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_COMPILED)
        torch._dynamo.config.accumulated_recompile_limit = max(
            torch._dynamo.config.accumulated_recompile_limit, _MAX_COMPILED
        )

    def reserve(self, num_layers: int) -> None:
        """Take the memory of so many layers, of the embedding and of the head."""
        ends = 2 * self._end_elements + 2 * align_elements(self._config.hidden_size)  # a last norm may have a bias
        num_weights = num_layers * self.layer_elements + ends
        self._weights = Workspace(num_elements=num_weights, dtype=self._dtype, device=self._device)
        num_cached = num_layers * 2 * align_elements(self._cache_elements)
        self._caches = Workspace(num_elements=num_cached, dtype=self._dtype, device=self._device)

    def build(self, plan: Plan, layers: Sequence[int], mode: str = _MODE) -> Step:
        """Build the call and run it, so that it is compiled.

        Raises:
            PlanError: if the plan drops the attention of every layer.
        """
        config = build_plan_config(self._config, plan, layers)
        model = self._build_model(config, is_stock=changes_nothing(plan))
        generation = self._generation
        input_ids = torch.tensor([generation.prompt] * self._batch_size, device=self._device)
        compile_config: Any = CompileConfig()
        compile_config._compile_all_devices = True  # or a CPU runs the step uncompiled
        cache = self._build_cache(model)
        num_cached = max(0, generation.num_prompt_tokens - 1) if generation.num_steps else 0

        def run() -> float:
            _rewind(cache, num_cached)
            clock = _Clock(generation, self._device)
            model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                past_key_values=cache,
                max_new_tokens=generation.num_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
                compile_config=compile_config,
            )
            return clock.read_ms()

        for _ in range(3):  # compiles; then, on a GPU, records and captures graphs
            run()
        return Step(run, is_clocked=True)

    def close(self) -> None:
        """Forget the compiled steps."""
        torch.compiler.reset()

    def _build_model(self, config: PretrainedConfig, *, is_stock: bool) -> PreTrainedModel:
        """Build a model with weights from the memory of all, and buffers of its own."""
        from accelerate import init_empty_weights

        self._weights.rewind()
        model_class: Any = AutoModelForCausalLM if is_stock else getattr(modeling, cast(Any, config).architectures[0])
        build: Any = model_class.from_config if is_stock else model_class._from_config
        with init_empty_weights(include_buffers=False), torch.inference_mode(False):
            model: Any = build(config, dtype=self._dtype)
        taken: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in taken:  # a head may be the embedding
                    taken[id(parameter)] = nn.Parameter(self._weights.take(parameter.shape), requires_grad=False)
                module.register_parameter(name, taken[id(parameter)])
        model.to(self._device)  # the buffers
        model.generation_config.eos_token_id = None  # every call generates the same number of tokens
        model.generation_config.pad_token_id = 0
        built: PreTrainedModel = model.eval()
        return built

    @torch.inference_mode(False)
    @torch.no_grad()
    def _build_cache(self, model: PreTrainedModel) -> StaticCache:
        """Build a static cache whose memory is that of all plans' caches."""
        cache = StaticCache(config=model.config, max_cache_len=self._generation.num_tokens)
        model(torch.ones((self._batch_size, 1), dtype=torch.long, device=self._device), past_key_values=cache)
        self._caches.rewind()
        for layer in cache.layers:
            for name in ("keys", "values"):
                shared = self._caches.take(getattr(layer, name).shape)
                torch._dynamo.mark_static_address(shared)  # as the cache did with its own
                setattr(layer, name, shared)
        return cache


class _Clock(LogitsProcessor):  # type: ignore[misc,no-untyped-call,unused-ignore]
    """Notes the time at the first token and at the last; of a prompt from the beginning to the first token.

    Args:
        generation: what is timed.
        device: CUDA devices are timed by events, others by the clock.
    """

    def __init__(self, generation: Generation, device: torch.device) -> None:
        self._generation, self._is_cuda = generation, device.type == "cuda"
        self._marks: list[Any] = []
        self._num_tokens = 0
        if generation.num_steps == 0:
            self._mark()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Count a token, whose logits, (batch, vocabulary), stay as they are."""
        self._num_tokens += 1
        if self._num_tokens in (1, self._generation.num_new_tokens):
            self._mark()
        return scores

    def read_ms(self) -> float:
        """Return the mean time of a decode step, or that of the prompt."""
        assert len(self._marks) == 2, "generate stopped early"
        start, stop = self._marks
        count = max(1, self._generation.num_steps)
        if self._is_cuda:
            stop.synchronize()
            return float(start.elapsed_time(stop)) / count
        return float(stop - start) * 1e3 / count

    def _mark(self) -> None:
        if not self._is_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)


def _rewind(cache: StaticCache, num_tokens: int) -> None:
    """Let a cache hold so many tokens, whatever they are."""
    for layer in cache.layers:
        held: Any = layer
        held.cumulative_length.fill_(min(num_tokens, held.max_cache_len))
        if hasattr(held, "cumulative_length_int"):  # of a sliding layer
            held.cumulative_length_int = num_tokens
