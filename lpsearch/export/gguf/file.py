"""Write a plan as one GGUF file: from a model in memory, or from files tensor by tensor."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFEndian, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lpsearch.errors import LpsearchError
from lpsearch.export.base import BaseModel, open_model, open_source, replace_weights
from lpsearch.export.gguf.checks import check_gguf, check_gguf_target, check_quantisation
from lpsearch.export.gguf.formats import Quantisation, is_quantised
from lpsearch.export.gguf.stored import StoredModel
from lpsearch.export.gguf.tensors import DeciTensors, GgufTensor
from lpsearch.export.gguf.tokenizer import add_tokenizer_keys, read_tokenizer
from lpsearch.models import ModelSource
from lpsearch.models.gguf_header import read_gguf_header
from lpsearch.models.packaged import fetch_package
from lpsearch.models.traits import read_traits
from lpsearch.plan import ModelIdentity, Plan
from lpsearch.staging import check_disk, staged_file
from lpsearch.transform import check_plan_layers, check_plan_numbers
from lpsearch.transform.deci import ARCHITECTURE, DeciBlock, add_model_keys, lay_out_blocks
from lpsearch.versions import __version__

__all__ = ["export_gguf", "export_gguf_source", "read_file_type"]

logger = logging.getLogger(__name__)

_METADATA_BYTES = 64 << 20
"""Room left for the vocabulary and the header."""

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


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
        LpsearchError: if the disk has too little room, or is full before the end.

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
        LpsearchError: if the disk has too little room, or is full before the end.
    """
    target = Path(target)
    check_gguf_target(target)
    check_quantisation(quantisation)

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
    check_quantisation(quantisation)
    check_gguf(base.config)
    check_plan_numbers(
        plan, num_layers=base.identity.num_layers, fingerprint=base.identity.fingerprint, name=base.identity.id
    )
    blocks = lay_out_blocks(read_traits(base.config), plan)
    deci = DeciTensors(base, stored, blocks, quantisation)
    tensors = deci.list_tensors()
    writer = GGUFWriter(None, ARCHITECTURE, endianess=GGUFEndian.LITTLE)
    _add_tokenizer(writer, base, stored)
    _add_model(writer, base, blocks, plan)
    is_copied = stored is not None and any(is_quantised(tensor.format) for tensor in tensors)
    file_type = stored.file_type if is_copied and stored is not None else None
    writer.add_file_type(_FILE_TYPES[deci.quantisation] if file_type is None else file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    needed_bytes = sum(tensor.num_bytes for tensor in tensors) + _METADATA_BYTES
    advice = "name a file on another disk, or write it in 8 bits (--quant q8_0)"
    check_disk(target, needed_bytes, what="file", advice=advice)
    try:
        with staged_file(target) as staging:
            _write_tensors(writer, tensors, staging, on_progress)
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy says how much it wrote, and not why that was all.
        raise LpsearchError(
            f"{target}: the file could not be written to its end ({error}), as where a disk is full; free some space, "
            f"{advice}"
        ) from error
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


def _add_model(writer: GGUFWriter, base: BaseModel, blocks: Sequence[DeciBlock], plan: Plan) -> None:
    """Add the keys of the architecture, and what the file was made of."""
    context_len = base.config.max_position_embeddings
    add_model_keys(writer, read_traits(base.config), blocks, context_len=context_len)
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
    add_tokenizer_keys(writer, keys)


def _name_base(identity: ModelIdentity) -> str:
    """Return the name of the base model, without the directories of a local one."""
    return Path(identity.id).name if Path(identity.id).is_absolute() else identity.id
