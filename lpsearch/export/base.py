"""The unmodified model as an export reads it: its configuration, its tensors one by one, and what goes with them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lpsearch.export.shards import SafetensorsReader
from lpsearch.models import ModelSource, fingerprint_model, load_model
from lpsearch.models.fingerprint import fingerprint_tensors
from lpsearch.models.geometry import load_config
from lpsearch.models.loading import fetch_directory, refuse_quantised
from lpsearch.models.packaged import LICENCE_NAMES, fetch_package
from lpsearch.models.quiet import quiet_transformers
from lpsearch.models.traits import read_traits
from lpsearch.plan import ModelIdentity
from lpsearch.transform import check_fusible

__all__ = ["BaseModel", "open_model", "open_source"]

logger = logging.getLogger(__name__)

_CARD_LICENCE = re.compile(r"^license:\s*[\"']?([\w.-]+)", re.MULTILINE)


@dataclass(frozen=True)
class BaseModel:
    """An unmodified model that can be read tensor by tensor.

    Attributes:
        config: its configuration.
        generation_config: its defaults for ``generate``.
        identity: what plans record of it.
        dtype: that its weights are stored in.
        read: returns a tensor by its name in the state dict; None if there is none.
        tokenizer: None if it is not known.
        licence: its identifier as the base's model card gives it; None if it is not known.
        notices: its licence and notice files.
    """

    config: PretrainedConfig
    generation_config: GenerationConfig
    identity: ModelIdentity
    dtype: torch.dtype
    read: Callable[[str], Tensor | None]
    tokenizer: PreTrainedTokenizerBase | None = None
    licence: str | None = None
    notices: tuple[Path, ...] = ()


def open_model(model: PreTrainedModel, *, identity: ModelIdentity | None = None) -> BaseModel:
    """View a model in memory as what is to be exported; nothing is copied.

    Args:
        model: unmodified.
        identity: what is recorded of it; None takes its name and fingerprint.

    Raises:
        FamilyError: if the family cannot be fused.
        ModelError: if the model is quantised, fused already or has a plan applied.
    """
    check_fusible(model)
    config: Any = model.config
    if identity is None:
        identity = ModelIdentity(
            id=config.name_or_path or type(model).__name__,
            num_layers=config.num_hidden_layers,
            fingerprint=fingerprint_model(model),
        )
    tensors = model.state_dict()
    return BaseModel(
        config=config,
        generation_config=model.generation_config,
        identity=identity,
        dtype=model.dtype,
        read=tensors.get,
    )


def open_source(source: ModelSource) -> BaseModel:
    """Open a model to export it, reading its tensors from their files if they are stored under their own names.

    Args:
        source: a directory, a hub repository, a packaged model or a GGUF file; the last is dequantised into memory.

    Raises:
        FamilyError: if the family cannot be fused.
        ModelError: if the model does not exist, is quantised, incomplete or unusable.
        SourceError: if it exists but cannot be fetched now.
    """
    if source.kind == "gguf":
        return _open_loaded(source, dtype=torch.float32)
    directory = fetch_directory(source)
    if source.kind == "hub":
        source = replace(source, revision=directory.name)
    config = load_config(directory)
    refuse_quantised(directory, config)
    read_traits(config).check_fusing()
    reader = SafetensorsReader(directory)
    with torch.device("meta"), quiet_transformers():
        build: Any = AutoModelForCausalLM.from_config
        stock: PreTrainedModel = build(config)
    tied = set(getattr(stock, "all_tied_weights_keys", ())) if config.tie_word_embeddings else set()
    if missing := sorted(set(stock.state_dict()) - tied - reader.names):
        logger.info(
            "%s stores its weights under other names (%s is not there): loading it whole", source.id, missing[0]
        )
        return _open_loaded(source, dtype=dtype if isinstance(dtype := config.dtype, torch.dtype) else torch.float32)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(directory)
    first = reader.read(next(iter(stock.state_dict())))
    assert first is not None  # it is among the names
    identity = ModelIdentity(
        id=source.id,
        revision=source.revision,
        num_layers=config.num_hidden_layers,
        fingerprint=fingerprint_tensors(stock, reader.read),
    )
    generation_config = (
        GenerationConfig.from_pretrained(directory)
        if (directory / "generation_config.json").is_file()
        else stock.generation_config
    )
    notices = _find_notices(fetch_package(source.id).parent if source.kind == "package" else directory)
    return BaseModel(
        config=config,
        generation_config=generation_config,
        identity=identity,
        dtype=first.dtype,
        read=reader.read,
        tokenizer=tokenizer,
        licence=_read_licence(directory),
        notices=notices,
    )


def _open_loaded(source: ModelSource, *, dtype: torch.dtype) -> BaseModel:
    """Load a model whole."""
    loaded = load_model(source, device="cpu", dtype=dtype)
    base = open_model(loaded.model, identity=loaded.identity)
    directory = source.path.parent if source.kind == "gguf" and source.path is not None else source.path
    notices = () if directory is None else _find_notices(directory)
    return replace(base, tokenizer=loaded.tokenizer, notices=notices)


def _find_notices(directory: Path) -> tuple[Path, ...]:
    """Find the licence and notice files beside a model."""
    return tuple(file for file in sorted(directory.iterdir()) if file.name.upper().startswith(LICENCE_NAMES))


def _read_licence(directory: Path) -> str | None:
    """Read the licence in the model card of a directory; None if it has no card, or the card does not say."""
    try:
        card = (directory / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    header = card.split("---")[1] if card.startswith("---") else ""
    match = _CARD_LICENCE.search(header)
    return match[1] if match else None
