"""What stands in the way of loading a model, told from its small files: each kind has its own sentence and remedy."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from lpsearch.errors import ModelError, describe_error
from lpsearch.models.image_text import holds_language_model

__all__ = [
    "describe_config_failure",
    "describe_custom_code",
    "describe_tokenizer_failure",
    "refuse_other_tasks",
    "refuse_unlike_layers",
    "refuse_without_vocabulary",
]

_VOCABULARY_PATTERNS = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json", "merges.txt")
_LISTS_OF_SIZES = ("num_query_heads", "num_kv_heads", "num_key_value_heads", "num_attention_heads", "intermediate_size")
_PER_LAYER = ("block_configs", "num_key_value_heads_per_layer", "ffn_multipliers", "per_layer_config")


def refuse_unlike_layers(directory: Path, config: PretrainedConfig | None = None) -> None:
    """Refuse a model whose configuration gives its layers unlike sizes, as those of DeciLM and OpenELM do.

    Raises:
        ModelError: naming the field that does.
    """
    document = _read_json(directory / "config.json")
    parts = [document, *(part for part in document.values() if isinstance(part, dict) and "num_hidden_layers" in part)]
    fields = [name for part in parts for name in (*_LISTS_OF_SIZES, *_PER_LAYER) if _varies(part.get(name))]
    if not fields and not getattr(config, "is_heterogeneous", False):
        return
    raise ModelError(
        f"{directory / 'config.json'}: its layers are of unlike size ({fields[0] if fields else 'per_layer_config'}); "
        "lpsearch takes models whose layers are all of one size, e.g. the model that this one was pruned from"
    )


def refuse_other_tasks(directory: Path, config: PretrainedConfig) -> None:
    """Refuse a model that is no causal language model of transformers, and has none inside.

    Raises:
        ModelError: naming its model type.
    """
    is_custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not is_custom and not holds_language_model(config):
        raise ModelError(
            f"{directory}: transformers has no causal language model of model type {config.model_type} "
            f"({type(config).__name__}); give a decoder-only text model"
        )


def describe_config_failure(where: Path, error: Exception) -> ModelError:
    """Make the error of a configuration that transformers cannot read.

    Args:
        where: ``config.json``, or a GGUF file.
        error: what transformers raised.

    Returns:
        The error to raise. A configuration of layers of unlike size is refused as such, since no code helps.
    """
    if where.name == "config.json":
        try:
            refuse_unlike_layers(where.parent)
        except ModelError as refusal:
            return refusal
        if _needs_custom_code(where, error):
            return describe_custom_code(where.parent, "config.json")
    return ModelError(
        f"{where}: not a model configuration that the installed transformers reads: {describe_error(error)}"
    )


def refuse_without_vocabulary(directory: Path) -> None:
    """Refuse a directory without the files of a tokenizer; transformers may make an empty one of nothing.

    Raises:
        ModelError: if it has none, nor code that may do without.
    """
    has_vocabulary = any(any(directory.glob(pattern)) for pattern in _VOCABULARY_PATTERNS)
    if not has_vocabulary and not _has_custom_code(directory / "tokenizer_config.json"):
        raise ModelError(
            f"{directory}: there is no tokenizer; expected tokenizer.json, tokenizer.model or vocab.json with "
            "merges.txt; copy these files, and tokenizer_config.json, from the model that this one was made from"
        )


def describe_tokenizer_failure(directory: Path, error: Exception) -> ModelError:
    """Make the error of a tokenizer that transformers cannot read."""
    if _needs_custom_code(directory / "tokenizer_config.json", error):
        return describe_custom_code(directory, "tokenizer_config.json")
    package = None if (directory / "tokenizer.json").exists() else _find_missing_package(directory)
    if package:
        file, name = package
        return ModelError(
            f"{file}: reading this tokenizer needs {name}, which is not installed; run `pip install {name}`, or put "
            "beside it the tokenizer.json that `AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)` "
            f"writes where {name} is installed"
        )
    return ModelError(f"{directory}: its tokenizer cannot be loaded: {describe_error(error)}")


def _find_missing_package(directory: Path) -> tuple[Path, str] | None:
    """Return a vocabulary that no installed package reads, and the package that would; None if there is none."""
    for file in sorted([*directory.glob("*.model"), *directory.glob("*.tiktoken")]):
        name = "tiktoken" if _is_tiktoken(file) else "sentencepiece"
        if importlib.util.find_spec(name) is None:
            return file, name
    return None


def _is_tiktoken(file: Path) -> bool:
    """Say whether a vocabulary is in tiktoken's form, lines of a token in base64 and its rank; others are binary."""
    with file.open("rb") as stream:
        words = stream.readline(1000).split()
    return len(words) == 2 and words[1].isdigit()


def _has_custom_code(file: Path) -> bool:
    """Say whether a JSON file names Python code of the model's own repository."""
    return bool(_read_json(file).get("auto_map"))


def _needs_custom_code(file: Path, error: Exception) -> bool:
    """Say whether an error of transformers is that it was not allowed to run the code that a JSON file names."""
    return "trust_remote_code" in str(error) and _has_custom_code(file)


def describe_custom_code(directory: Path, name: str) -> ModelError:
    """Make the error of a repository whose own code would have to run."""
    return ModelError(
        f"{directory}: the model comes with Python code of its own (auto_map in {name}), which lpsearch runs only with "
        "`--trust-remote-code`; read the code first (`optimize`, `evaluate` and `generate` have the option, the other "
        "commands do not take such a model)"
    )


def _varies(value: Any) -> bool:
    """Say whether a field gives layers unlike values: a list whose entries differ, or overrides of some layers."""
    if isinstance(value, list):
        return any(item != value[0] for item in value)
    return isinstance(value, Mapping) and bool(value)


def _read_json(file: Path) -> dict[str, Any]:
    """Read an object from a JSON file; empty if there is none."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
