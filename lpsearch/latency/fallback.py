"""Steps of families that the runtime does not compute: transformers' own eager execution, by shape, decode steps only.

Where a widened configuration gives a decoder layer with exactly the members' weights, a group is one wide layer: m
times the heads, key-value heads and intermediate size. Elsewhere (mixtures of experts, packed heads) layers are timed
alone, and a group costs what its layers cost. The profile says which. A branch that a plan drops does not run. Only the
time matters, so the weights are random.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from lpsearch.errors import FamilyError
from lpsearch.latency.runtime.memory import Workspace, align_elements
from lpsearch.latency.sums import OneRank
from lpsearch.latency.workload import Step, Workload
from lpsearch.models.families import DecoderBlock, get_decoder, get_decoder_layers, run_group
from lpsearch.models.traits import FamilyTraits
from lpsearch.plan import Group, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["FixedCacheLayer", "TransformersSteps", "select_layers", "widen_config"]

_MODE = "transformers eager"


def widen_config(config: PretrainedConfig, num_attentions: int, num_mlps: int | None = None) -> PretrainedConfig:
    """Return a copy of a text configuration whose decoder layers are wider inside.

    Args:
        config: of the model.
        num_attentions: how many times as many heads.
        num_mlps: how many times as large an intermediate size; None for as many.
    """
    wide = copy.deepcopy(config)
    if num_attentions != 1:
        num_heads = config.num_attention_heads
        wide.head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        wide.num_attention_heads = num_heads * num_attentions
        if getattr(config, "num_key_value_heads", None) is not None:
            wide.num_key_value_heads = config.num_key_value_heads * num_attentions
    if (num_mlps or num_attentions) != 1:
        wide.intermediate_size = config.intermediate_size * (num_mlps or num_attentions)
    return wide


class FixedCacheLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's cache that always holds ``context_len`` tokens: each step writes the same last entry.

    Attends to valid entries only and copies none of them, as a static cache of the right length would. Memory is taken
    at the first step, when the number of heads is known.

    Args:
        context_len: tokens before the one that is decoded.
        sliding_window: tokens that the layer attends to at most, itself included; None for all.
        workspace: where to take the memory from.
    """

    def __init__(self, *, context_len: int, sliding_window: int | None, workspace: Workspace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_sliding = sliding_window is not None
        self._context_len = context_len
        self._num_cached = context_len if sliding_window is None else min(context_len, sliding_window - 1)
        self._workspace = workspace

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token's keys and values, ``(batch, kv_heads, 1, head_dim)``, and return all."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys = self._workspace.take((*key_states.shape[:2], self._num_cached + 1, key_states.shape[-1]))
            self.values = self._workspace.take((*value_states.shape[:2], self._num_cached + 1, value_states.shape[-1]))
            self.is_initialized = True
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return number and first position of the entries that are attended to."""
        return self._num_cached + query_length, self._context_len - self._num_cached

    def get_seq_length(self) -> int:
        """Return the number of tokens before the one that is decoded."""
        return self._context_len


@dataclass(frozen=True)
class _Layers:
    """What the model runs under one plan: its layers, their cache, and the configuration values that go with them."""

    layers: tuple[nn.Module, ...]
    cache: Cache
    config_values: Mapping[str, Any]


class TransformersSteps:
    """A :class:`lpsearch.latency.workload.StepBuilder`: decode steps of transformers' own model on one device.

    Args:
        traits: of the model.
        workload: a decode workload.
        device: where to run.
        dtype: of weights and cache.

    Raises:
        FamilyError: if transformers cannot build the model from its configuration.
    """

    modes = (_MODE,)
    ranks = OneRank()
    shares_memory = True

    def __init__(self, traits: FamilyTraits, workload: Workload, *, device: torch.device, dtype: torch.dtype) -> None:
        assert workload.kind == "decode"
        self._config = copy.deepcopy(traits.config)
        self._workload = workload
        self._device, self._dtype = device, dtype
        skeleton = _build_skeleton(self._config, device=torch.device("meta"), dtype=dtype)
        self._layer_class = type(get_decoder_layers(skeleton)[0])
        for choice in ("_attn_implementation", "_experts_implementation"):  # made when the model is built
            setattr(self._config, choice, getattr(skeleton.config, choice, None))
        singles = [self._build_meta_layer(index, 1) for index in range(traits.num_layers)]
        self.fuses = not any(traits.has_experts) and self._can_widen(singles)
        self.runtime = f"{_MODE}, {'fused layers' if self.fuses else 'layers not fused'}"
        self.layer_elements = max(sum(align_elements(p.numel()) for p in layer.parameters()) for layer in singles)
        self.token_elements = 2 * traits.num_kv_heads * traits.head_dim
        self._form = traits.family.block
        self._windows = [kind.window for kind in traits.kinds]

    def reserve(self, num_layers: int) -> None:
        """Build everything but the layers, and take the memory of so many."""
        batch_size, context_len = self._workload.batch_size, self._workload.context_len
        self._model = _build_skeleton(self._config, device=self._device, dtype=self._dtype)
        self._input_ids = torch.zeros((batch_size, 1), dtype=torch.long, device=self._device)
        self._position_ids = torch.full((1, 1), context_len, dtype=torch.long, device=self._device)
        num_weights = num_layers * self.layer_elements
        self._weights = Workspace(num_elements=num_weights, dtype=self._dtype, device=self._device)
        num_cached = batch_size * (context_len + 1) * self.token_elements // 2
        self._caches = Workspace(
            num_elements=num_layers * 2 * align_elements(num_cached), dtype=self._dtype, device=self._device
        )

    def build(self, plan: Plan, layers: Sequence[int], mode: str = _MODE) -> Step:
        """Build a decode step: one token a sequence, embedding to argmax."""

        def name(positions: Sequence[int]) -> tuple[int, ...]:
            return tuple(layers[position] for position in positions)

        groups = [
            Group(name(group.layers), name(group.attention_layers), name(group.mlp_layers))
            for group in plan.groups
            if group.num_stages
        ]
        built = self._build_layers(groups)

        def run() -> torch.Tensor:
            self._use(built)
            outputs = self._model(
                input_ids=self._input_ids, position_ids=self._position_ids, past_key_values=built.cache, use_cache=True
            )
            return torch.as_tensor(outputs.logits)[:, -1].argmax(dim=-1)

        run()  # takes the cache's memory now, before another plan rewinds the workspace
        return Step(run)

    def close(self) -> None:
        """Do nothing: what the model holds goes with it."""

    def _build_layers(self, groups: Sequence[Group]) -> _Layers:
        """Build one wide layer a group; members that attend differently all attend like one that sees everything."""
        members = [
            max(group.attention_layers or group.layers, key=lambda layer_idx: self._windows[layer_idx] is None)
            for group in groups
        ]
        config_values = select_layers(self._config, members)
        self._weights.rewind()
        self._caches.rewind()
        layers = []
        for slot, (member, group) in enumerate(zip(members, groups, strict=True)):
            meta = self._build_meta_layer(member, len(group.attention_layers) or 1, len(group.mlp_layers) or 1)
            if not (group.attention_layers and group.mlp_layers):
                _drop_branch(DecoderBlock(meta, self._form, bool(group.attention_layers), bool(group.mlp_layers)))
            layer = _materialise(meta, self._weights)
            for module in layer.modules():  # which know their slot of the cache, and the configuration
                known = vars(module)
                if "layer_idx" in known:
                    known["layer_idx"] = slot
                if "config" in known:
                    _set_values(known["config"], config_values)
            layers.append(layer)
        caches: list[Any] = [
            FixedCacheLayer(
                context_len=self._workload.context_len,
                sliding_window=self._windows[member],
                workspace=self._caches,
            )
            for member in members
        ]
        return _Layers(tuple(layers), Cache(layers=caches), config_values)

    def _use(self, built: _Layers) -> None:
        """Make the model run these layers."""
        layers = get_decoder_layers(self._model)
        del layers[:]
        layers.extend(built.layers)
        decoder: Any = get_decoder(self._model)
        for config in (self._model.config, decoder.config):  # one object in most families
            _set_values(config, built.config_values)

    def _can_widen(self, singles: Sequence[nn.Module]) -> bool:
        """Tell whether the decoder layer, given a widened configuration, has exactly the members' weights.

        It has not where the head size follows from the number of heads.
        """
        if len({tuple(parameter.shape for parameter in layer.parameters()) for layer in singles}) > 1:
            return False
        pairs = zip(singles[0].parameters(), self._build_meta_layer(0, 2).parameters(), strict=True)
        return all(wide.numel() == 2 * single.numel() for single, wide in pairs if single.ndim > 1)

    def _build_meta_layer(self, layer_idx: int, num_attentions: int, num_mlps: int | None = None) -> nn.Module:
        """Build a layer of the model, so many times as wide, without memory."""
        with torch.device("meta"):
            layer = self._layer_class(widen_config(self._config, num_attentions, num_mlps), layer_idx)
        return layer.eval().requires_grad_(False)


def _drop_branch(block: DecoderBlock) -> None:
    """Have a layer run the one branch that is left of it, and hold no weights of the other."""
    form, layer = block.form, block.layer
    attention = {form.attention, form.attention_norm, *form.attention_post}
    mlp = {"mlp", form.mlp_norm, *form.mlp_post}
    for name in attention - mlp if block.runs_mlp else mlp - attention:
        if name is not None:
            delattr(layer, name)

    def run(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return run_group([block], hidden_states, [kwargs])

    layer.forward = run


def select_layers(config: PretrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    """Return the values of a configuration that has only some of the layers: their number and its per-layer lists."""
    lists = {name: [value[index] for index in layers] for name, value in _per_layer_lists(config).items()}
    return {**lists, "num_hidden_layers": len(layers)}


def _per_layer_lists(config: PretrainedConfig) -> dict[str, list[Any]]:
    """Return the entries of a configuration that have one value a layer, such as ``layer_types``."""
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers
    }


def _build_skeleton(config: PretrainedConfig, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model with few decoder layers, to be replaced; embedding, head, norm and rotary are real.

    It has one layer of each kind, since some models prepare at construction for the kinds that they have.
    """
    per_layer = [tuple(values) for values in zip(*_per_layer_lists(config).values(), strict=True)]
    firsts = sorted({kind: index for index, kind in reversed(list(enumerate(per_layer)))}.values())
    skeleton_config = copy.deepcopy(config)
    _set_values(skeleton_config, select_layers(config, firsts or [0]))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                skeleton_config, dtype=dtype
            )
        except ValueError as error:
            raise FamilyError(
                f"transformers cannot build a {config.model_type} model from its configuration to time it: {error}; "
                "`lpsearch optimize --latency off` searches without its times"
            ) from None
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def _materialise(layer: nn.Module, workspace: Workspace) -> nn.Module:
    """Give a layer without memory weights from the workspace, and buffers of zeros."""
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(workspace.take(parameter.shape), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros_like(buffer, device=workspace.device), persistent=False)
    return layer


def _set_values(config: PretrainedConfig, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)
