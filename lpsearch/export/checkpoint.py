"""Write a directory with a fused checkpoint: from a model in memory, or from files tensor by tensor."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lpsearch.export.base import BaseModel, open_model, open_source, replace_weights
from lpsearch.export.card import write_card
from lpsearch.export.shards import INDEX_NAME, Shard, TensorSpec, list_shards, write_shard
from lpsearch.models import ModelSource
from lpsearch.models.quiet import quiet_transformers
from lpsearch.plan import RECOVERED_PLAN_NAME, ModelIdentity, Plan, PlanMetadata, save_plan, write_json
from lpsearch.staging import check_disk, check_target, staged
from lpsearch.transform import check_plan_layers, check_plan_numbers
from lpsearch.transform import modeling_lpsearch as modeling
from lpsearch.transform.fused_config import build_fused_config
from lpsearch.transform.fused_weights import InterleavedWeights

__all__ = ["export_checkpoint", "export_source"]

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 4 * 10**9
"""Largest safetensors file written, unless a single tensor is larger."""

_OTHER_FILES_BYTES = 64 << 20
"""Room left for the tokenizer and the other small files."""


def export_checkpoint(
    model: PreTrainedModel,
    plan: Plan,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a directory with a plan's fused checkpoint, which transformers loads without lpsearch.

    The directory holds safetensors, the configuration, the modelling code for
    ``AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)``, the generation configuration, the
    tokenizer, a model card and the plan. Branches that the plan drops are not stored. It appears whole or not at all.
    The model stays as it is.

    Args:
        model: an unmodified language model of a family that can be fused, on any device.
        plan: for this model.
        directory: where to; it must not exist, or be empty.
        tokenizer: of the model; without one the directory has none.
        dtype: that the weights are written in; None for the model's own. What is folded is rounded to it once.
        max_shard_bytes: largest safetensors file.

    Returns:
        The directory.

    Raises:
        PlanError: if the plan is for another model, or drops the attention of every layer.
        FamilyError: if the family cannot be fused.
        ModelError: if the model is quantised, fused already or has a plan applied.
        UsageError: if the directory is not empty.
        LpsearchError: if the disk has too little room.

    Example:
        >>> import tempfile
        >>> import lpsearch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
        >>> model = AutoModelForCausalLM.from_config(config)  # usually: from_pretrained(...)
        >>> plan = lpsearch.Plan.from_groups([[0], [1, 2], [3]])  # usually: load_plan("studies/.../joins-06.json")
        >>> directory = lpsearch.export_checkpoint(model, plan, tempfile.mkdtemp())
        >>> fused = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)  # needs no lpsearch
        >>> fused.config.num_hidden_layers
        3
    """
    base = open_model(model)
    return _write_directory(
        replace(base, tokenizer=tokenizer), plan, Path(directory), dtype, max_shard_bytes, lambda done, total: None
    )


def export_source(
    source: ModelSource,
    plan: Plan,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    weights: Mapping[str, Tensor] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the same directory from a model that is not in memory, reading and writing tensor by tensor.

    Args:
        source: from :func:`lpsearch.models.resolve_source`. Only a GGUF file, or weights that are stored under other
            names than the model's own, are loaded whole.
        plan: for this model.
        directory: as for :func:`export_checkpoint`.
        dtype: as for :func:`export_checkpoint`; None for what the weights are stored in.
        max_shard_bytes: largest safetensors file.
        weights: repaired weights of the decoder layers that stand in place of the model's, by their names in a
            recovered directory (``layers.3.mlp.down_proj.weight``).
        on_progress: called with tensors written and tensors in all.

    Returns:
        The directory.

    Raises:
        PlanError: if the plan is for another model, or drops the attention of every layer.
        FamilyError: if the family cannot be fused.
        ModelError: if the model does not exist, is quantised, incomplete or unusable.
        SourceError: if the model exists but cannot be fetched now.
        UsageError: if the directory is not empty.
        LpsearchError: if the disk has too little room.
    """
    target = Path(directory)
    check_target(target)  # before anything is fetched

    def check(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        check_plan_layers(plan, config)

    base = open_source(source, before_weights=check)
    if weights:
        base = replace_weights(base, plan, weights)
    return _write_directory(base, plan, target, dtype, max_shard_bytes, on_progress)


def _write_directory(
    base: BaseModel,
    plan: Plan,
    target: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    on_progress: Callable[[int, int], None],
) -> Path:
    """Check everything, then write a temporary directory beside the target and rename it."""
    check_target(target)
    check_plan_numbers(
        plan, num_layers=base.identity.num_layers, fingerprint=base.identity.fingerprint, name=base.identity.id
    )
    config: Any = build_fused_config(base.config, plan)
    config.dtype = dtype or base.dtype
    shards = list_shards(_list_tensors(config), max_shard_bytes=max_shard_bytes)
    needed_bytes = sum(shard.num_bytes for shard in shards) + _OTHER_FILES_BYTES
    advice = "name a directory on another disk, or write it in bfloat16 (--dtype bfloat16)"
    check_disk(target, needed_bytes, what="checkpoint", advice=advice)
    plan = _complete_plan(plan, base.identity)
    with staged(target) as staging:
        _write_weights(staging, shards, InterleavedWeights(base.config, config, base.read), on_progress)
        with quiet_transformers():
            config.save_pretrained(staging)  # with the modelling code
            base.generation_config.save_pretrained(staging)
            if base.tokenizer is not None:
                base.tokenizer.save_pretrained(staging)
        for notice in base.notices:
            shutil.copyfile(notice, staging / notice.name)
        save_plan(plan, staging / RECOVERED_PLAN_NAME)
        write_card(staging / "README.md", plan=plan, config=config, licence=base.licence, notices=base.notices)
    logger.info("wrote %s: %d layers as %g, %s", target, plan.num_layers, plan.depth, config.dtype)
    return target


def _list_tensors(config: Any) -> list[TensorSpec]:
    """List the tensors of a fused checkpoint: those of the model, tied ones once."""
    model_class: Any = getattr(modeling, config.architectures[0])
    with torch.device("meta"), quiet_transformers():
        model = model_class(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return [
        TensorSpec(name, tuple(tensor.shape), config.dtype)
        for name, tensor in model.state_dict().items()
        if name not in tied
    ]


def _write_weights(
    directory: Path, shards: list[Shard], weights: InterleavedWeights, on_progress: Callable[[int, int], None]
) -> None:
    """Write all safetensors files, and their index if there are several."""
    total = sum(len(shard.tensors) for shard in shards)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    for shard in shards:
        write_shard(directory, shard, weights.compute, count)
    if len(shards) > 1:
        weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
        metadata = {"total_size": sum(shard.num_bytes for shard in shards)}
        write_json({"metadata": metadata, "weight_map": weight_map}, directory / INDEX_NAME)


def _complete_plan(plan: Plan, identity: ModelIdentity) -> Plan:
    """Give a plan made by hand the model that it was checked against, so that it can be written."""
    return plan if plan.metadata is not None else Plan(plan.groups, PlanMetadata(model=identity))
