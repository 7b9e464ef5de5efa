"""Transformers models by shape: random weights, any depth, a group of layers as one wide layer.

Fused, a group of m layers is one decoder layer with m times the heads, key-value heads and intermediate size: the rows
of its input projections are the members' stacked, the columns of its output projections the members' side by side, so
that the sum over the group happens inside the products. Here only the time matters, so the weights are random.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lpsearch.errors import FamilyError
from lpsearch.latency.runtime.memory import Workspace, align_elements
from lpsearch.models.families import get_decoder, get_decoder_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["FixedCacheLayer", "ShapeModel", "can_widen", "widen_config"]

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def widen_config(config: PretrainedConfig, group_size: int) -> PretrainedConfig:
    """Return a copy of a text configuration whose decoder layers are ``group_size`` times as wide inside."""
    wide = copy.deepcopy(config)
    if group_size == 1:
        return wide
    num_heads = config.num_attention_heads
    wide.head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    wide.num_attention_heads = num_heads * group_size
    if getattr(config, "num_key_value_heads", None) is not None:
        wide.num_key_value_heads = config.num_key_value_heads * group_size
    wide.intermediate_size = config.intermediate_size * group_size
    return wide


def can_widen(config: PretrainedConfig) -> bool:
    """Tell whether the family's decoder layer, given a widened configuration, has exactly the members' weights.

    It has not where experts are routed to, or where the head size follows from the number of heads.
    """
    if any((getattr(config, name, None) or 0) > 1 for name in _EXPERT_COUNTS):
        return False
    layer_class = _find_layer_class(config)
    singles = [_build_meta_layer(layer_class, config, index) for index in range(config.num_hidden_layers)]
    shapes = {tuple(parameter.shape for parameter in layer.parameters()) for layer in singles}
    if len(shapes) > 1:  # layers differ from each other
        return False
    wide = _build_meta_layer(layer_class, widen_config(config, 2), 0)
    pairs = list(zip(singles[0].parameters(), wide.parameters(), strict=True))
    return all(w.numel() == 2 * s.numel() for s, w in pairs if s.ndim > 1)


class FixedCacheLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's cache that always holds ``context_len`` tokens: each step writes the same last entry.

    Attends to valid entries only and copies none of them, as a static cache of the right length would.
    """

    def __init__(self, *, context_len: int, sliding_window: int | None, workspace: Workspace) -> None:
        """Describe the cache; memory is taken at the first step, when the number of heads is known.

        Args:
            context_len: tokens before the one that is decoded.
            sliding_window: tokens that the layer attends to at most, itself included; None for all.
            workspace: where to take the memory from.
        """
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
class _Depth:
    """One model within the workspace: its layers, its cache, and the configuration values that go with them."""

    layers: tuple[nn.Module, ...]
    cache: Cache
    config_values: Mapping[str, Any]


class ShapeModel:
    """A transformers model of a given shape with random weights, that can take on several depths.

    Args:
        config: text configuration; its number of layers is the number built.
        batch_size: sequences decoded together.
        context_len: cached tokens of each.
        device: where to run.
        dtype: dtype of weights and cache.

    Raises:
        FamilyError: if transformers has no model for the configuration.
    """

    def __init__(
        self, config: PretrainedConfig, *, batch_size: int, context_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Build everything but the layers."""
        self._config = copy.deepcopy(config)
        self._context_len = context_len
        self._model = _build_skeleton(self._config, device=device, dtype=dtype)
        self._config._attn_implementation = self._model.config._attn_implementation  # chosen when it was built
        self._layers = get_decoder_layers(self._model)
        self._layer_class = type(self._layers[0])
        self._input_ids = torch.zeros((batch_size, 1), dtype=torch.long, device=device)
        self._position_ids = torch.full((1, 1), context_len, dtype=torch.long, device=device)
        sizes = layer_sizes(self._config)
        self._weights = Workspace(num_elements=sum(sizes), dtype=dtype, device=device)
        num_cached = cache_size(self._config, batch_size=batch_size, context_len=context_len)
        self._caches = Workspace(num_elements=num_cached, dtype=dtype, device=device)

    def build_depth(self, group_sizes: Sequence[int]) -> _Depth:
        """Build the layers of a plan, one wide layer a group.

        Args:
            group_sizes: layers in each group, in order.
        """
        firsts = [sum(group_sizes[:index]) for index in range(len(group_sizes))]
        config_values = select_layers(self._config, firsts)
        self._weights.rewind()
        self._caches.rewind()
        layers = []
        for slot, size in enumerate(group_sizes):
            wide = widen_config(self._config, size)
            _set_values(wide, config_values)
            layers.append(_materialise(_build_meta_layer(self._layer_class, wide, slot), self._weights))
        base = copy.deepcopy(self._config)
        _set_values(base, config_values)
        cache = Cache(
            layers=[
                FixedCacheLayer(
                    context_len=self._context_len,
                    sliding_window=getattr(layer, "sliding_window", None) if _is_sliding(layer) else None,
                    workspace=self._caches,
                )
                for layer in _build_template_cache(base, len(group_sizes))
            ]
        )
        depth = _Depth(tuple(layers), cache, config_values)
        self.use_depth(depth)
        self.run_step()  # takes the cache's memory now, before another depth rewinds the workspace
        return depth

    def use_depth(self, depth: _Depth) -> None:
        """Make the model run the layers of a depth."""
        del self._layers[:]
        self._layers.extend(depth.layers)
        decoder: Any = get_decoder(self._model)
        for config in (self._model.config, decoder.config):  # one object in most families
            _set_values(config, depth.config_values)
        self._cache = depth.cache

    def run_step(self) -> torch.Tensor:
        """Decode one token a sequence, embedding to argmax; returns the tokens, ``(batch,)``."""
        outputs = self._model(
            input_ids=self._input_ids, position_ids=self._position_ids, past_key_values=self._cache, use_cache=True
        )
        return torch.as_tensor(outputs.logits)[:, -1].argmax(dim=-1)


def select_layers(config: PretrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    """Return the values of a configuration that has only some of the layers: their number and its per-layer lists."""
    lists = {name: [value[index] for index in layers] for name, value in _per_layer_lists(config).items()}
    return {**lists, "num_hidden_layers": len(layers)}


def layer_sizes(config: PretrainedConfig) -> list[int]:
    """Return the number of elements, padding included, of each decoder layer's weights."""
    layer_class = _find_layer_class(config)
    layers = (_build_meta_layer(layer_class, config, index) for index in range(config.num_hidden_layers))
    return [sum(align_elements(parameter.numel()) for parameter in layer.parameters()) for layer in layers]


def cache_size(config: PretrainedConfig, *, batch_size: int, context_len: int) -> int:
    """Return the number of elements, padding included, of a full-attention cache of all layers."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers) * 2 * align_elements(batch_size * num_heads * (context_len + 1) * head_dim)


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
                "use --latency off"
            ) from None
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def _find_layer_class(config: PretrainedConfig) -> type[nn.Module]:
    return type(get_decoder_layers(_build_skeleton(config, device=torch.device("meta"), dtype=torch.float32))[0])


def _build_meta_layer(layer_class: type[nn.Module], config: PretrainedConfig, layer_idx: int) -> nn.Module:
    with torch.device("meta"):
        return layer_class(config, layer_idx).eval().requires_grad_(False)


def _materialise(layer: nn.Module, workspace: Workspace) -> nn.Module:
    """Give a layer without memory weights from the workspace, and buffers of zeros."""
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(workspace.take(parameter.shape), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros_like(buffer, device=workspace.take((1,)).device), persistent=False)
    return layer


def _set_values(config: PretrainedConfig, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _build_template_cache(config: PretrainedConfig, num_layers: int) -> list[Any]:
    """Return the cache layers that transformers would use, which say where attention slides; None if untold."""
    layers: list[Any] = DynamicCache(config=config).layers
    return layers if len(layers) == num_layers else [None] * num_layers


def _is_sliding(cache_layer: Any) -> bool:
    return bool(getattr(cache_layer, "is_sliding", False))
