"""Writing small GGUF files of Llama models, as llama.cpp's ``convert_hf_to_gguf.py`` does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from tests.tiny_models import build_tiny_model

__all__ = ["VOCABULARY", "build_llama", "write_gguf"]

VOCABULARY = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "in"]

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def build_llama(**options: Any) -> PreTrainedModel:
    """Build a tiny Llama with the vocabulary that :func:`write_gguf` writes."""
    return build_tiny_model(
        "llama", num_layers=3, vocab_size=len(VOCABULARY), bos_token_id=0, eos_token_id=0, **options
    )


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    extra: Mapping[str, np.ndarray[Any, Any]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    block_count: int | None = None,
) -> Path:
    """Write a Llama in float32.

    Args:
        path: the file.
        model: the model.
        extra: more tensors by their names in the file.
        metadata: more strings, integers and floats.
        block_count: number of layers that the metadata has; the model's if None.

    Returns:
        The file.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(block_count or config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - 1))
    writer.add_token_merges(["t h", "i n"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, int: writer.add_uint16, float: writer.add_float32}[type(value)]
        add(key, value)
    for name, weight in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        values = weight.numpy()
        if module.endswith("q_proj"):
            values = _interleave(values, config.num_attention_heads)
        if module.endswith("k_proj"):
            values = _interleave(values, config.num_key_value_heads)
        writer.add_tensor(f"{_rename(module)}.{suffix}", np.ascontiguousarray(values))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _rename(module: str) -> str:
    """Return llama.cpp's name of a module."""
    if module in _OUTER_NAMES:
        return _OUTER_NAMES[module]
    _, _, layer_idx, inner = module.split(".", 3)
    return f"blk.{layer_idx}.{_NAMES[inner]}"


def _interleave(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Bring the rows of each head from halves to pairs, the order of llama.cpp's rotary embedding for Llama."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
