"""What a model's configuration decides, checked before its weights are fetched or loaded and windows are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lpsearch.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lpsearch.models import ModelSource

__all__ = ["check_positions", "read_config", "read_num_layers"]


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
    """Return the number of decoder layers."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def check_positions(config: PretrainedConfig, *, seq_len: int) -> None:
    """Refuse windows that are longer than a model reads.

    Raises:
        DataError: if they are.
    """
    from lpsearch.models import find_max_positions

    longest = find_max_positions(config)
    if longest is not None and seq_len > longest:
        raise DataError(f"--seq-len is {seq_len}, but the model reads at most {longest} tokens; lower --seq-len")
