"""Write a plan as one GGUF file: from a model in memory, or from files tensor by tensor."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFEndian, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lpsearch.errors import UsageError
from lpsearch.export.base import BaseModel, open_model, open_source, replace_weights
from lpsearch.export.gguf.blocks import arrange_blocks, check_gguf
from lpsearch.export.gguf.formats import QUANTISATIONS, Quantisation, is_quantised
from lpsearch.export.gguf.stored import StoredModel
from lpsearch.export.gguf.tensors import DeciTensors, GgufTensor
from lpsearch.export.gguf.tokenizer import TokenizerKeys, read_tokenizer
from lpsearch.models import ModelSource
from lpsearch.models.gguf_header import read_gguf_header
from lpsearch.models.packaged import fetch_package
from lpsearch.models.traits import read_traits
from lpsearch.plan import ModelIdentity, Plan
from lpsearch.staging import check_disk, staged_file
from lpsearch.transform import check_plan_layers, check_plan_numbers
from lpsearch.versions import __version__

__all__ = ["check_gguf_target", "export_gguf", "export_gguf_source", "read_file_type"]

logger = logging.getLogger(__name__)

_ARCHITECTURE = "deci"
_METADATA_BYTES = 64 << 20
"""Room left for the vocabulary and the header."""

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def check_gguf_target(target: Path) -> None:
    """Refuse a file that exists, or whose name does not say what it is.

    Raises:
        UsageError: if it is such a one.
    """
    if target.suffix != ".gguf":
        raise UsageError(f"{target}: the name of a GGUF file ends in .gguf; name such a file")
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists; name a new file, or remove this one")


def export_gguf(
    model: PreTrainedModel,
    plan: Plan,
    target: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantisation: Quantisation | None = None,
) -> Path:
    """Write a plan as one GGUF file, which stock llama.cpp runs.

    Each group becomes one wide block of llama.cpp's architecture ``deci``; branches that the plan drops are not stored.
    The file holds the tokenizer, the chat template and the plan (``lpsearch.plan``). It appears whole or not at all.
    The model stays as it is.

    Args:
        model: an unmodified language model of a family that ``deci`` computes, on any device.
        plan: for this model.
        target: the file; it must not exist.
        tokenizer: of the model; without one the file has none, and takes token ids alone.
        quantisation: what matrices are stored as; None for the model's dtype. Vectors are float32.

    Returns:
        The file.

    Raises:
        PlanError: if the plan is for another model.
        FamilyError: if ``deci`` would compute the model otherwise.
        ModelError: if the model is quantised, fused already or has a plan applied, or llama.cpp has no tokenizer like
            the one given.
        UsageError: if the file exists, or the quantisation is none that is written.
        LpsearchError: if the disk has too little room.

    Example:
        >>> import tempfile
        >>> import lpsearch
        >>> from pathlib import Path
        >>> from lpsearch.export.gguf import export_gguf
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
        >>> model = AutoModelForCausalLM.from_config(config)  # usually: from_pretrained(...)
        >>> plan = lpsearch.Plan.from_groups([[0], [1, 2], [3]])  # usually: load_plan("studies/.../joins-06.json")
        >>> export_gguf(model, plan, Path(tempfile.mkdtemp()) / "tiny.gguf", quantisation="q8_0").name
        'tiny.gguf'
    """
    target = Path(target)
    check_gguf_target(target)
    base = open_model(model)
    return _write(replace(base, tokenizer=tokenizer), None, plan, target, quantisation, lambda done, total: None)


def export_gguf_source(
    source: ModelSource,
    plan: Plan,
    target: str | Path,
    *,
    quantisation: Quantisation | None = None,
    weights: Mapping[str, Tensor] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the same file from a model that is not in memory, reading and writing tensor by tensor.

    Of a GGUF file (also one inside a package) the tokenizer's keys are copied, and what the plan leaves alone is copied
    byte for byte. Groups are made of the dequantised weights.

    Args:
        source: from :func:`lpsearch.models.resolve_source`. A GGUF file is loaded whole.
        plan: for this model.
        target: as for :func:`export_gguf`.
        quantisation: what matrices are stored as, but for those that the source holds quantised, which are copied; None
            for what the source has, and q8_0 for the groups of a quantised one.
        weights: as for :func:`~lpsearch.export.export_source`.
        on_progress: called with tensors written and tensors in all.

    Returns:
        The file.

    Raises:
        PlanError: if the plan is for another model.
        FamilyError: if ``deci`` would compute the model otherwise.
        ModelError: if the model does not exist, is quantised (as no GGUF file), incomplete or unusable, or llama.cpp
            has no tokenizer like its own.
        SourceError: if the model exists but cannot be fetched now.
        UsageError: if the file exists, or the quantisation is none that is written.
        LpsearchError: if the disk has too little room.
    """
    target = Path(target)
    check_gguf_target(target)
    _check_quantisation(quantisation)

    def check(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        check_plan_layers(plan, config)
        check_gguf(config)
        if path is None:
            read_tokenizer(tokenizer, vocab_size=config.vocab_size)

    path = fetch_package(source.id) if source.kind == "package" else source.path if source.kind == "gguf" else None
    stored = None if path is None else StoredModel(path)
    if stored is not None:
        stored.check_attention()
    base = open_source(source, before_weights=check)
    if weights:
        base = replace_weights(base, plan, weights)
    return _write(base, stored, plan, target, quantisation, on_progress)


def read_file_type(path: Path) -> str:
    """Return llama.cpp's name of what most of a GGUF file is stored as, e.g. ``MOSTLY_Q8_0``."""
    return LlamaFileType(read_gguf_header(path).metadata["general.file_type"]).name


def _write(
    base: BaseModel,
    stored: StoredModel | None,
    plan: Plan,
    target: Path,
    quantisation: Quantisation | None,
    on_progress: Callable[[int, int], None],
) -> Path:
    """Check everything, then write a temporary file beside the target and rename it."""
    _check_quantisation(quantisation)
    check_gguf(base.config)
    check_plan_numbers(
        plan, num_layers=base.identity.num_layers, fingerprint=base.identity.fingerprint, name=base.identity.id
    )
    deci = DeciTensors(base, stored, arrange_blocks(plan), quantisation)
    tensors = deci.list_tensors()
    writer = GGUFWriter(None, _ARCHITECTURE, endianess=GGUFEndian.LITTLE)
    _add_tokenizer(writer, base, stored)
    _add_model(writer, base, deci, plan)
    is_copied = stored is not None and any(is_quantised(tensor.format) for tensor in tensors)
    file_type = stored.file_type if is_copied and stored is not None else None
    writer.add_file_type(_FILE_TYPES[deci.quantisation] if file_type is None else file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    needed_bytes = sum(tensor.num_bytes for tensor in tensors) + _METADATA_BYTES
    advice = "name a file on another disk, or write it in 8 bits (--quant q8_0)"
    check_disk(target, needed_bytes, what="file", advice=advice)
    with staged_file(target) as staging:
        _write_tensors(writer, tensors, staging, on_progress)
    logger.info("wrote %s: %d layers as %g", target, plan.num_layers, plan.depth)
    return target


def _write_tensors(
    writer: GGUFWriter, tensors: Sequence[GgufTensor], path: Path, on_progress: Callable[[int, int], None]
) -> None:
    """Write the header, then one tensor after the other."""
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=tensor.format
        )
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, start=1):
            writer.write_tensor_data(tensor.build())
            on_progress(done, len(tensors))
    finally:
        writer.close()


def _add_model(writer: GGUFWriter, base: BaseModel, deci: DeciTensors, plan: Plan) -> None:
    """Add the keys of the architecture, and what the file was made of."""
    traits = read_traits(base.config)
    parameters: dict[str, Any] = base.config.rope_parameters
    writer.add_block_count(len(deci.head_counts))
    writer.add_context_length(base.config.max_position_embeddings)
    writer.add_embedding_length(traits.hidden_size)
    writer.add_feed_forward_length(deci.feed_forward_lengths)
    writer.add_head_count(deci.head_counts)
    writer.add_head_count_kv(deci.kv_head_counts)
    writer.add_key_length(traits.head_dim)
    writer.add_value_length(traits.head_dim)
    writer.add_rope_dimension_count(traits.head_dim)
    writer.add_rope_freq_base(float(parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(traits.norm_eps)
    writer.add_vocab_size(traits.vocab_size)
    identity = plan.metadata.model if plan.metadata is not None else base.identity
    writer.add_string("lpsearch.version", __version__)
    writer.add_string("lpsearch.plan", json.dumps(json.loads(plan.key)))
    writer.add_string("lpsearch.base_model", _name_base(identity))
    writer.add_string("lpsearch.base_fingerprint", identity.fingerprint)


def _add_tokenizer(writer: GGUFWriter, base: BaseModel, stored: StoredModel | None) -> None:
    """Add the keys of the tokenizer, and the name and the licence: copied from a GGUF file, else made."""
    if stored is not None:
        for entry in stored.list_metadata():
            writer.add_key_value(entry.key, entry.value, entry.type, sub_type=entry.item_type)
        return
    if base.licence is not None:
        writer.add_license(base.licence)
    name = _name_base(base.identity)
    if base.tokenizer is None:
        writer.add_name(name)
        writer.add_tokenizer_model("none")
        return
    keys = read_tokenizer(base.tokenizer, vocab_size=base.config.vocab_size)
    writer.add_name(keys.fit_name(name))
    _add_keys(writer, keys)


def _add_keys(writer: GGUFWriter, keys: TokenizerKeys) -> None:
    """Add the keys of a tokenizer that was read from a Hugging Face one."""
    writer.add_tokenizer_model(keys.model)
    writer.add_tokenizer_pre(keys.pre)
    writer.add_token_list(keys.tokens)
    writer.add_token_types(keys.types)
    if keys.merges:
        writer.add_token_merges(keys.merges)
    if keys.scores:
        writer.add_token_scores(keys.scores)
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, token_id in keys.special_ids.items():
        add_id[name](token_id)
    writer.add_add_bos_token(keys.adds_bos)
    writer.add_add_eos_token(keys.adds_eos)
    if keys.adds_space is not None:
        writer.add_add_space_prefix(keys.adds_space)
    if keys.chat_template is not None:
        writer.add_chat_template(keys.chat_template)


def _name_base(identity: ModelIdentity) -> str:
    """Return the name of the base model, without the directories of a local one."""
    return Path(identity.id).name if Path(identity.id).is_absolute() else identity.id


def _check_quantisation(quantisation: str | None) -> None:
    """Refuse a quantisation that is not written.

    Raises:
        UsageError: naming those that are.
    """
    if quantisation is not None and quantisation not in QUANTISATIONS:
        raise UsageError(
            f"quantisation {quantisation!r} is none that is written; choose one of {', '.join(QUANTISATIONS)}, and "
            "llama.cpp's `llama-quantize` makes others of a file in f16 or f32"
        )
