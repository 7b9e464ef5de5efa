"""The unmodified model as an export reads it: its configuration, its tensors one by one, and what goes with them."""

from __future__ import annotations

import copy
import gc
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lpsearch.errors import ModelError
from lpsearch.export.shards import DTYPES, SafetensorsReader
from lpsearch.models import ModelSource, fingerprint_model, get_decoder_layers, load_model
from lpsearch.models.conversion import WeightlessCheck
from lpsearch.models.fingerprint import fingerprint_tensors, fingerprints_match
from lpsearch.models.geometry import load_config
from lpsearch.models.image_text import extract_language_model, find_text_config
from lpsearch.models.loading import fetch_directory, refuse_quantised
from lpsearch.models.packaged import LICENCE_NAMES, fetch_package
from lpsearch.models.quiet import quiet_transformers
from lpsearch.models.stored_weights import read_stored_tensors
from lpsearch.models.traits import read_traits
from lpsearch.plan import ModelIdentity, Plan
from lpsearch.transform import check_fusible, check_plan_numbers
from lpsearch.transform.fuse import has_tied_head

__all__ = ["BaseModel", "open_model", "open_source", "replace_weights"]

_NUM_SAMPLES = 16
_CARD_LICENCE = re.compile(r"^license:\s*[\"']?([\w.-]+)", re.MULTILINE)


@dataclass(frozen=True)
class BaseModel:
    """An unmodified model that can be read tensor by tensor.

    Attributes:
        config: its configuration; ``tie_word_embeddings`` says whether head and embedding are one tensor.
        generation_config: its defaults for ``generate``.
        identity: what plans record of it.
        dtype: that its weights are stored in.
        read: returns a tensor by its name in the state dict; None if there is none.
        tokenizer: None if it is not known.
        licence: its identifier as the base's model card gives it; None if it is not known.
        notices: its licence and notice files.
        replaced: names of the tensors that repaired ones stand in place of.
    """

    config: PretrainedConfig
    generation_config: GenerationConfig
    identity: ModelIdentity
    dtype: torch.dtype
    read: Callable[[str], Tensor | None]
    tokenizer: PreTrainedTokenizerBase | None = None
    licence: str | None = None
    notices: tuple[Path, ...] = ()
    replaced: frozenset[str] = frozenset()


def open_model(model: PreTrainedModel, *, identity: ModelIdentity | None = None) -> BaseModel:
    """View a model in memory as what is to be exported; nothing is copied.

    Args:
        model: unmodified; of an image-text model, the language model inside is taken.
        identity: what is recorded of it; None takes its name and fingerprint.

    Raises:
        FamilyError: if the family cannot be fused.
        ModelError: if the model is quantised, fused already or has a plan applied.
    """
    model = extract_language_model(model)
    check_fusible(model)
    config: Any = copy.deepcopy(model.config)
    config.tie_word_embeddings = has_tied_head(model)
    if identity is None:
        identity = ModelIdentity(
            id=config.name_or_path or type(model).__name__,
            num_layers=len(get_decoder_layers(model)),
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


def open_source(source: ModelSource, *, before_weights: WeightlessCheck | None = None) -> BaseModel:
    """Open a model to export it, as the search loads it.

    Transformers says what the model is: which files count, what is tied, what has to be converted. Its tensors are
    mapped, compared with the files at some places and let go, since what was read of a map stays in memory. Each is
    read from its file when it is asked for and dropped when it is written; one that its file does not hold under its
    own name is kept as transformers loaded it.

    Args:
        source: a directory, a hub repository, a packaged model or a GGUF file; the last is dequantised into memory.
        before_weights: as for :func:`~lpsearch.models.load_model`.

    Raises:
        FamilyError: if the family cannot be fused.
        ModelError: if the model does not exist, is quantised, incomplete or unusable.
        SourceError: if it exists but cannot be fetched now.
    """
    if source.kind == "gguf":
        loaded = load_model(source, device="cpu", dtype=torch.float32, before_weights=before_weights)
        directory = Path(source.id).parent
        base = open_model(loaded.model, identity=loaded.identity)
        return replace(base, tokenizer=loaded.tokenizer, notices=_find_notices(directory))
    directory = fetch_directory(source)
    config = load_config(directory)
    refuse_quantised(directory, config)
    read_traits(find_text_config(config)).check_fusing()
    loaded = load_model(source, device="cpu", dtype=_find_dtype(directory), before_weights=before_weights)
    stored = SafetensorsReader(directory)
    converted = {
        name: tensor for name, tensor in loaded.model.state_dict().items() if not _is_stored(tensor, stored.read(name))
    }

    def read(name: str) -> Tensor | None:
        return converted[name] if name in converted else stored.read(name)

    base = replace(
        open_model(loaded.model, identity=loaded.identity),
        read=read,
        tokenizer=loaded.tokenizer,
        licence=_read_licence(directory),
        notices=_find_notices(fetch_package(source.id).parent if source.kind == "package" else directory),
    )
    del loaded
    gc.collect()  # a model refers to itself; what is mapped goes with it
    return base


def replace_weights(base: BaseModel, plan: Plan, weights: Mapping[str, Tensor]) -> BaseModel:
    """Let repaired weights stand in place of the model's.

    Raises:
        PlanError: if the plan is for another model.
        ModelError: if the model has no such weights, or with them it is not the one that the plan belongs to.
    """
    identity = base.identity
    check_plan_numbers(
        plan.without_recovery(), num_layers=identity.num_layers, fingerprint=identity.fingerprint, name=identity.id
    )
    decoder = read_traits(base.config).family.decoder
    replaced = {f"{decoder}.{name}": tensor for name, tensor in weights.items()}
    for name, tensor in replaced.items():
        present = base.read(name)
        if present is None or present.shape != tensor.shape:
            found = "none" if present is None else f"one of shape {tuple(present.shape)}"
            raise ModelError(f"{name}: repaired is one of shape {tuple(tensor.shape)}, and {identity.id} has {found}")
    recovery = plan.metadata.provenance.recovery if plan.metadata is not None else None
    repaired = replace(
        base,
        read=lambda name: replaced[name] if name in replaced else base.read(name),
        replaced=frozenset(replaced),
    )
    if recovery is None:
        return repaired
    fingerprint = _fingerprint(repaired)
    if not fingerprints_match(fingerprint, recovery.fingerprint):
        raise ModelError(
            f"with the repaired weights the fingerprint of {identity.id} is {fingerprint}, expected "
            f"{recovery.fingerprint}: they are not those of the plan; run `lpsearch recover` again"
        )
    return replace(repaired, identity=identity.model_copy(update={"fingerprint": recovery.fingerprint}))


def _fingerprint(base: BaseModel) -> str:
    """Return the fingerprint of a model that is read tensor by tensor."""
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"), quiet_transformers():
        model = build(base.config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = (
        names[id(parameter)]
        for layer in get_decoder_layers(model)
        for _, parameter in sorted(layer.named_parameters(), key=lambda item: item[0])
    )
    tensors = map(base.read, ordered)
    return fingerprint_tensors(base.config, (tensor for tensor in tensors if tensor is not None))


def _find_dtype(directory: Path) -> torch.dtype:
    """Return the dtype in which most of the weights in a directory are stored."""
    num_elements: Counter[str] = Counter()
    for tensor in read_stored_tensors(directory).values():
        num_elements[tensor.dtype] += math.prod(tensor.shape)
    return DTYPES.get(num_elements.most_common(1)[0][0], torch.float32)


def _is_stored(loaded: Tensor, stored: Tensor | None) -> bool:
    """Say whether a tensor of the loaded model is the one that its file holds, by its shape and some elements.

    NaN in both is the same element: a damaged weight is no converted one.
    """
    if stored is None or stored.shape != loaded.shape:
        return False
    flat, other = stored.reshape(-1), loaded.reshape(-1)
    places = torch.arange(_NUM_SAMPLES) * flat.numel() // _NUM_SAMPLES
    return torch.allclose(flat[places].to(other.dtype), other[places], rtol=0, atol=0, equal_nan=True)


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
