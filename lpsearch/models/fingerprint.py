"""Fingerprints: which model a plan or a study is for.

A fingerprint is ``<geometry>-<weights>``, two hashes of 16 hex digits.

*geometry* hashes the numbers that fix the shapes of the computation: model type, layers, widths, heads, vocabulary. It
takes none of the fields that transformers adds, renames or restructures between versions (rotary settings, attention
implementation), so that it is equal for a GGUF file, the same model saved as a directory, and one on the meta device.

*weights* hashes sixteen elements, evenly spread, of every parameter of the decoder layers, in the order of layers and
names, rounded to bfloat16. It is therefore equal whether the model was loaded in float32 or bfloat16, and whether a
plan is applied or not. A model in float16 has lost what would tell, and one on the meta device has no weights: there
the part is zeros, and :func:`fingerprints_match` compares geometries only.

A plan is about decoder layers, and so is its fingerprint. Losses depend on more: :func:`fingerprint_parts` hashes what
else makes up a model, part by part, so that a study knows its model and can say which part is another one.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lpsearch.errors import ResumeError
from lpsearch.models.families import get_decoder, get_decoder_layers
from lpsearch.models.placement import read_parameter
from lpsearch.models.traits import read_traits

__all__ = [
    "check_parts",
    "fingerprint_geometry",
    "fingerprint_model",
    "fingerprint_parts",
    "fingerprint_tensors",
    "fingerprints_match",
]

_HASH_DIGITS = 16
_SAMPLES_PER_PARAMETER = 16
_NO_WEIGHTS = "0" * _HASH_DIGITS
_COMPARABLE = (torch.float32, torch.bfloat16)  # float16 lost what bfloat16 would have kept, or kept too much
_SAMPLE_TEXT = "The  quick brown fox's 1234567890 jumps,\n\tnaïve Übermut; 東京 🙂 </s><unk>"


def fingerprint_model(model: PreTrainedModel) -> str:
    """Return the fingerprint of a model, on any device, with or without a plan applied.

    Raises:
        FamilyError: if the model's decoder layers cannot be found.
    """
    return fingerprint_tensors(model.config, _list_parameters(model))


def fingerprint_tensors(config: PretrainedConfig, tensors: Iterable[Tensor]) -> str:
    """Return the fingerprint of a model that is not in memory.

    Args:
        config: its configuration.
        tensors: the parameters of its decoder layers, in the order of layers and of names within a layer; they are
            taken one by one.
    """
    return f"{fingerprint_geometry(config)}-{_hash_weights(tensors)}"


def fingerprint_parts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return a fingerprint of each part that losses depend on, by its name in words.

    Embedding and head are sampled in every row, since a few rows may have been trained alone. Weights in float32 and
    bfloat16 are compared as bfloat16, others in their own dtype, which then stands before the hash.

    Raises:
        FamilyError: if the model's decoder layers cannot be found.
    """
    decoder: Any = get_decoder(model)
    embedding: nn.Module = decoder.get_input_embeddings()
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    elsewhere = {id(tensor) for part in (decoder.layers, embedding) for tensor in part.parameters()}
    rest = [name for name, tensor in sorted(decoder.named_parameters()) if id(tensor) not in elsewhere]
    return {
        "configuration": _hash_arithmetic(decoder, model.config),
        "decoder": _hash_samples(tensor.detach().reshape(1, -1) for tensor in _list_parameters(model)),
        "embedding": _hash_samples(_read_parameters(embedding)),
        "final norm": _hash_samples(read_parameter(decoder, name) for name in rest),
        "head": "none" if head is None else _hash_samples(_read_parameters(head)),
        "tokenizer": _hash_tokenizer(tokenizer),
    }


def check_parts(recorded: Mapping[str, str], present: Mapping[str, str], *, name: str) -> None:
    """Refuse to go on with a study on a model of which a part is another one.

    Args:
        recorded: fingerprints of the parts that the study was begun with; those of an old study may be none.
        present: those of the model as it is now. Weights in unlike dtypes cannot be compared.
        name: of the model.

    Raises:
        ResumeError: naming every part that differs.
    """
    changed = [
        part
        for part, fingerprint in recorded.items()
        if part in present
        and fingerprint != present[part]
        and fingerprint.rpartition(":")[0] == present[part].rpartition(":")[0]
    ]
    if changed:
        verb = "differs" if len(changed) == 1 else "differ"
        raise ResumeError(
            f"{name}: the study was begun with another model: the {' and the '.join(changed)} {verb}, so losses cannot "
            "be compared with those recorded; put the old model back, add --fresh to move the old study aside, or name "
            "another directory with --out"
        )


def fingerprint_geometry(config: PretrainedConfig) -> str:
    """Return the geometry part of the fingerprint of any model with this configuration."""
    traits = read_traits(config)
    geometry = {
        "model_type": traits.config.model_type,
        "num_layers": traits.num_layers,
        "hidden_size": traits.hidden_size,
        "intermediate_size": traits.intermediate_size,
        "num_heads": traits.num_heads,
        "num_key_value_heads": traits.num_kv_heads,
        "head_dim": traits.head_dim,
        "vocab_size": traits.vocab_size,
    }
    return _hash_json(geometry)


def fingerprints_match(first: str, second: str) -> bool:
    """Say whether two fingerprints can be of the same model; one without weights is compared by geometry alone."""
    geometry, _, weights = first.partition("-")
    other_geometry, _, other_weights = second.partition("-")
    if geometry != other_geometry:
        return False
    return weights == other_weights or _NO_WEIGHTS in (weights, other_weights)


def _read_parameters(module: nn.Module) -> Iterable[Tensor]:
    return (read_parameter(module, name) for name, _ in module.named_parameters())


def _list_parameters(model: PreTrainedModel) -> list[Tensor]:
    """List the parameters of the decoder layers in the order of layers and names."""
    return [
        read_parameter(layer, name)
        for layer in get_decoder_layers(model)
        for name in sorted(name for name, _ in layer.named_parameters())
    ]


@torch.no_grad()
def _hash_weights(parameters: Iterable[Tensor]) -> str:
    """Hash sampled elements of tensors; one transfer for each device that holds some."""
    samples_of_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    order = []
    for parameter in parameters:
        if parameter.is_meta or parameter.dtype not in _COMPARABLE:
            return _NO_WEIGHTS
        samples = samples_of_device[parameter.device]
        order.append((parameter.device, len(samples)))
        samples.append(_sample(parameter))
    on_host = {device: torch.stack(samples).cpu() for device, samples in samples_of_device.items()}
    digest = hashlib.sha256()
    for device, row in order:
        digest.update(on_host[device][row].numpy().tobytes())
    return digest.hexdigest()[:_HASH_DIGITS]


@torch.no_grad()
def _hash_samples(tensors: Iterable[Tensor]) -> str:
    """Hash sixteen elements, evenly spread, of every row of matrices; vectors whole."""
    digest, dtypes = hashlib.sha256(), set()
    for tensor in tensors:
        rows = tensor.detach().reshape(1, -1) if tensor.ndim < 2 else tensor.detach().flatten(1)
        digest.update(str(tuple(tensor.shape)).encode())
        if tensor.ndim > 1:
            positions = torch.arange(_SAMPLES_PER_PARAMETER, device=rows.device)
            rows = rows[:, positions * rows.shape[1] // _SAMPLES_PER_PARAMETER]
        dtype = torch.bfloat16 if tensor.dtype in _COMPARABLE else tensor.dtype
        dtypes.add(str(dtype).removeprefix("torch."))
        digest.update(rows.to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return f"{'+'.join(sorted(dtypes - {'bfloat16'})) or 'bfloat16'}:{digest.hexdigest()[:_HASH_DIGITS]}"


def _hash_arithmetic(decoder: nn.Module, config: PretrainedConfig) -> str:
    """Hash what a configuration says beside the geometry: scales, bounds, kinds of attention, rotary frequencies."""
    traits = read_traits(config)
    values = {
        "kinds": [(kind.name, kind.window, kind.rotates) for kind in traits.kinds],
        "norm_eps": traits.norm_eps,
        "is_parallel": traits.is_parallel,
        "hidden_act": traits.hidden_act,
        "attention_scale": traits.attention_scale,
        "attention_softcap": traits.attention_softcap,
        "logits_softcap": traits.logits_softcap,
        "embedding_scale": traits.embedding_scale,
        "residual_scale": traits.residual_scale,
        "logits_scale": traits.logits_scale,
    }
    buffers = dict(sorted(decoder.named_buffers()))
    # The others change with the length of the text, where they depend on it.
    names = [name for name in buffers if name.endswith("original_inv_freq")]
    frequencies = _hash_samples(buffers[name] for name in names or buffers if name.endswith("inv_freq"))
    return f"{frequencies.rpartition(':')[0]}:{_hash_json([values, frequencies])}"


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what a tokenizer does: its vocabulary, a sample of its work and its special tokens."""
    sample = tokenizer(_SAMPLE_TEXT, verbose=False).input_ids
    return _hash_json([sorted(tokenizer.get_vocab().items()), sample, tokenizer.bos_token_id, tokenizer.eos_token_id])


def _hash_json(document: Any) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:_HASH_DIGITS]


def _sample(parameter: Tensor) -> Tensor:
    """Return elements of a parameter as the bits of their bfloat16 rounding, int16 of shape (16,)."""
    flat = parameter.detach().reshape(-1)
    positions = torch.arange(_SAMPLES_PER_PARAMETER, device=flat.device) * flat.numel() // _SAMPLES_PER_PARAMETER
    return flat[positions].to(torch.bfloat16).view(torch.int16)
