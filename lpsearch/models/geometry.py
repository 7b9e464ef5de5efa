"""Configurations of models without their weights, for latency and dry runs."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from lpsearch.models.aliases import Alias, find_alias, list_aliases, read_geometry
from lpsearch.models.gguf_rope import apply_gguf_rope
from lpsearch.models.hub import fetch_config
from lpsearch.models.image_text import find_text_config, holds_language_model
from lpsearch.models.quiet import quiet_transformers
from lpsearch.models.refusals import describe_config_failure
from lpsearch.models.sources import ModelSource, resolve_source

__all__ = ["find_max_positions", "load_config", "load_geometry", "take_language_model"]


def load_geometry(model: str | ModelSource) -> PretrainedConfig:
    """Return the configuration of a model, or of the language model inside an image-text model, without its weights.

    That of an alias, or of the artefact that an alias names, is bundled and needs no network. Any other hub model's
    ``config.json`` is fetched.

    Args:
        model: a specification as ``--model`` takes it, or a source.

    Raises:
        ModelError: if the model is unknown or its configuration unusable.
        SourceError: if it must be fetched and cannot be.
    """
    source = model if isinstance(model, ModelSource) else resolve_source(model)
    alias = find_alias(model) if isinstance(model, str) else _find_alias_of(source)
    if alias is not None:
        fields = read_geometry(alias.name)
        with quiet_transformers():
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
    if source.path is not None:
        directory = source.path.parent if source.gguf_file else source.path
        config = load_config(directory, gguf_file=source.gguf_file)
    else:
        config = load_config(fetch_config(source.id, revision=source.revision or "main"))
    return take_language_model(config)


def load_config(directory: Path, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the configuration in a model directory or a GGUF file.

    Raises:
        ModelError: if it cannot be read, or its model type is unknown to the installed transformers.
    """
    where = directory / (gguf_file or "config.json")
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                directory, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:  # transformers raises whatever its parsers raise
        raise describe_config_failure(where, error) from error
    return apply_gguf_rope(config, where) if gguf_file else config


def take_language_model(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the language model inside an image-text model; any other as it is."""
    return find_text_config(config) if holds_language_model(config) else config


def find_max_positions(config: PretrainedConfig) -> int | None:
    """Return the most tokens that a model reads at once; None for one without such a limit, as with ALiBi.

    YaRN (Peng et al., arXiv 2309.00071) multiplies what the model was trained on; the configurations of some models
    (Qwen 2.5) give its factor and leave ``max_position_embeddings`` as it was.
    """
    text_config = config.get_text_config(decoder=True)
    longest = getattr(text_config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    found = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    for rope in (found, *found.values()):  # of all layers, or by kind of attention
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "yarn":
            trained = rope.get("original_max_position_embeddings") or text_config.max_position_embeddings
            longest = max(longest, int(trained * rope.get("factor", 1)))
    return longest


def _find_alias_of(source: ModelSource) -> Alias | None:
    """Return the alias whose artefact a source is, whatever its revision."""
    return next((alias for alias in list_aliases() if (alias.kind, alias.id) == (source.kind, source.id)), None)
