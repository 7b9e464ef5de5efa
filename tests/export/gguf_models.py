"""Tiny models and tokenizers of the kinds that are written as GGUF files, and the loop that says what they compute."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lpsearch.plan import Plan
from tests.tiny_models import build_tiny_model

__all__ = [
    "BYTE_LEVEL",
    "GGUF_OPTIONS",
    "TEXTS",
    "VOCAB_SIZE",
    "build_gguf_model",
    "build_tokenizer",
    "run_loop",
    "write_base_gguf",
]

VOCAB_SIZE = 640

GGUF_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 scaling": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            }
        },
    ),
    "linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "a window that never ends": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "granite": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "granite, tied": ("granite", {"tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, partial rotary, tied": ("phi3", {"sliding_window": None, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    }}),
    "seed_oss": ("seed_oss", {}),
}  # fmt: skip
"""Families and options that llama.cpp's ``deci`` computes, by a name of ours."""

TEXTS = (
    "Hello, world! It's 12345 o'clock.",
    "  two spaces\n\nand\tlines \n",
    "Größe, naïve café — 東京 🙂 e\u0301",
    "DON'T we'll I'VE xX 3.14159 // a_b-c",
    "",
)
"""Texts that pre-tokenizers cut in unlike ways."""

_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_START = r"[^\r\n\p{L}\p{N}]?"

BYTE_LEVEL: dict[str, tuple[list[Any], bool]] = {
    "gpt-2": ([pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
    "smollm": (
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        False,
    ),
    "qwen2": ([pre_tokenizers.Split(Regex(_WORDS + r"|\p{N}" + _TAIL), "isolated")], False),
    "llama-bpe": ([pre_tokenizers.Split(Regex(_WORDS + r"|\p{N}{1,3}" + _TAIL), "isolated")], True),
    "dbrx": ([pre_tokenizers.Split(Regex(_WORDS + r"|\p{N}{1,3}" + _TAIL), "isolated")], False),
    "tekken": (
        [
            pre_tokenizers.Split(
                Regex(rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}{_CASED}"), "isolated"
            )
        ],
        True,
    ),
    "gpt-4o": (
        [
            pre_tokenizers.Split(
                Regex(
                    rf"{_START}{_UPPER}*{_LOWER}+{_ENDING}|{_START}{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}{_CASED}"
                ),
                "isolated",
            )
        ],
        False,
    ),
}
"""What cuts a text before byte-level BPE, as published tokenizers have it, and whether they ignore merges."""


@cache
def build_tokenizer(kind: str, *, metaspace: str | None = None) -> PreTrainedTokenizerFast:
    """Train a tokenizer of a kind on this project's README.

    Args:
        kind: a key of :data:`BYTE_LEVEL`, or ``llama`` for SentencePiece's BPE as Llama 2 and Mistral have it.
        metaspace: where a ``llama`` puts a space before a text, in the newer form without a normaliser.
    """
    special = ["<unk>", "<s>", "</s>"]
    corpus = Path(__file__).parents[2] / "README.md"
    if kind == "llama":
        tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # Merges stay within a word while training, as SentencePiece's do.
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
        trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 8, special_tokens=tokens)
        backend.train([str(corpus)], trainer)
        backend.pre_tokenizer = None
        if metaspace is not None:
            backend.normalizer = None
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
        document = json.loads(backend.to_str())
        document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in special]
        backend = Tokenizer.from_str(json.dumps(document))
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        parts, ignores_merges = BYTE_LEVEL[kind]
        if not isinstance(parts[-1], pre_tokenizers.ByteLevel):
            parts = [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        backend = Tokenizer(models.BPE(ignore_merges=ignores_merges))
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - 8,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        backend.train([str(corpus)], trainer)
        backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if kind in ("llama", "llama-bpe", "tekken"):
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=_CHAT
    )


def build_gguf_model(name: str, **overrides: Any) -> PreTrainedModel:
    """Build a tiny model of :data:`GGUF_OPTIONS`, with room for the tokens of :func:`build_tokenizer`."""
    family, options = GGUF_OPTIONS[name]
    return build_tiny_model(family, **{"vocab_size": VOCAB_SIZE, **options, **overrides})


@torch.no_grad()
def run_loop(model: PreTrainedModel, plan: Plan, input_ids: list[int]) -> Tensor:
    """Compute the log-probabilities of the next token under a plan, one branch after the other, (vocab,) in float64.

    x' = x + sum of the attentions that the plan keeps, y = x' + sum of the MLPs that it keeps, group by group.
    """
    config: Any = model.config
    decoder: Any = model.model
    residual = getattr(config, "residual_multiplier", 1.0)
    seq = len(input_ids)
    mask = torch.full((seq, seq), float("-inf")).triu(1)[None, None]
    x = decoder.embed_tokens(torch.tensor([input_ids])) * getattr(config, "embedding_multiplier", 1.0)
    rotary = decoder.rotary_emb(x, torch.arange(seq)[None])
    dropped = plan.dropped
    for group in plan.to_lists():
        total = torch.zeros_like(x)
        for layer_idx in group:
            layer = decoder.layers[layer_idx]
            if layer_idx not in dropped["attention"]:
                normed = layer.input_layernorm(x)
                total += layer.self_attn(normed, attention_mask=mask, position_embeddings=rotary)[0]
        x = x + residual * total
        total = torch.zeros_like(x)
        for layer_idx in group:
            layer = decoder.layers[layer_idx]
            if layer_idx not in dropped["mlp"]:
                total += layer.mlp(layer.post_attention_layernorm(x))
        x = x + residual * total
    logits = model.lm_head(decoder.norm(x))[0, -1] / getattr(config, "logits_scaling", 1.0)
    return logits.double().log_softmax(-1)


_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_base_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: Path,
    *,
    architecture: str,
    quantisation: GGMLQuantizationType = GGMLQuantizationType.F32,
    sliding_window: int | None = None,
) -> Path:
    """Write a tiny model as a GGUF file of its own architecture, as llama.cpp's converter does: no plan, one size.

    Args:
        model: unmodified.
        tokenizer: of the kind ``smollm``.
        path: the file.
        architecture: ``llama`` (queries and keys in pairs), ``qwen2`` or ``phi3``.
        quantisation: of the matrices.
        sliding_window: that the metadata name.
    """
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = GGUFWriter(path, architecture)
    writer.add_name("a base")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = document["model"]["vocab"] | {token["content"]: token["id"] for token in document["added_tokens"]}
    tokens = {token_id: token for token, token_id in ids.items()}
    special = {token["id"] for token in document["added_tokens"] if token["special"]}
    if sliding_window is not None:
        writer.add_sliding_window(sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(config.vocab_size)])
    writer.add_token_types([3 if i in special else 1 if i in tokens else 5 for i in range(config.vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)

    def add(name: str, tensor: Tensor) -> None:
        array = tensor.detach().float().numpy()
        if array.ndim == 1 or quantisation == GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, quantisation), raw_dtype=quantisation)

    if config.rope_parameters["rope_type"] == "llama3":
        plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
        rotary: Any = model.model.rotary_emb
        add("rope_freqs.weight", plain / rotary.inv_freq)
    for name, tensor in model.state_dict().items():
        if name == "model.embed_tokens.weight":
            add("token_embd.weight", tensor)
        elif name == "model.norm.weight":
            add("output_norm.weight", tensor)
        elif name == "lm_head.weight":
            if not config.tie_word_embeddings:
                add("output.weight", tensor)
        else:
            _, _, layer, *module, kind = name.split(".")
            if architecture == "llama" and module[-1] in ("q_proj", "k_proj"):  # halves (0, d/2) become neighbours
                heads = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
                tensor = heads.swapaxes(1, 2).reshape(tensor.shape)
            add(f"blk.{layer}.{_NAMES['.'.join(module)]}.{kind}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
