"""What a model's configuration decides, checked before its weights are fetched or loaded and windows are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lpsearch.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lpsearch.models import ModelSource

__all__ = ["read_config", "read_num_layers"]


def read_config(source: ModelSource, *, trust_remote_code: bool = False) -> PretrainedConfig | None:
    """Read the configuration of a model, of an image-text model that of the language model inside, without its weights.

    Args:
        source: the model.
        trust_remote_code: the model may come with code of its own.

    Returns:
        None where only that code could read it, and for a GGUF file, whose header takes seconds; then what depends on
        it is checked when the model is loaded, before its weights are.

    Raises:
        ModelError: if there is no such model, or its weights are quantised.
        SourceError: if its configuration must be fetched and cannot be.
    """
    from lpsearch.models import load_geometry
    from lpsearch.models.loading import refuse_quantised

    if source.kind == "gguf":
        return None
    try:
        config = load_geometry(source)
    except ModelError:
        if trust_remote_code:
            return None
        raise
    refuse_quantised(Path(source.id), config)
    return config


def read_num_layers(config: PretrainedConfig) -> int:
    """Return the number of decoder layers.

    Raises:
        ModelError: for a configuration that names none.
    """
    num_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(num_layers, int):
        raise ModelError(
            f"the configuration of model type {config.model_type} names no number of decoder layers "
            "(num_hidden_layers); give a decoder-only text model"
        )
    return num_layers
