"""Loading an exported directory with this package's own modelling code, not the one that stands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lpsearch.errors import LpsearchError, ModelError, describe_error
from lpsearch.models.conversion import WeightlessCheck
from lpsearch.models.quiet import quiet_transformers
from lpsearch.models.stored_weights import check_loading
from lpsearch.transform import modeling_lpsearch as modeling

__all__ = ["is_exported", "load_exported", "read_dtype"]


def is_exported(path: Path) -> bool:
    """Say whether a path is a directory that ``export`` wrote."""
    return str(_read_config(path).get("model_type")).startswith(modeling.MODEL_TYPE_PREFIX)


def read_dtype(directory: Path) -> str:
    """Return the dtype of the weights in an exported directory, e.g. ``bfloat16``."""
    return str(_read_config(directory)["dtype"])


def load_exported(
    directory: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    before_weights: WeightlessCheck | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an exported directory, in evaluation mode and without gradients, and its tokenizer.

    Args:
        directory: that :func:`~lpsearch.export.export_checkpoint` wrote.
        device: where the weights go.
        dtype: what the weights are cast to.
        before_weights: as for :func:`~lpsearch.models.load_model`.

    Raises:
        ModelError: if it is not one, or is damaged or incomplete.
    """
    stem = (_read_config(directory).get("lpsearch") or {}).get("stem")
    if not is_exported(directory) or not isinstance(stem, str):
        raise ModelError(f"{directory}: not a directory that this version of `lpsearch export` wrote; export it again")
    try:
        model_class: Any = getattr(modeling, modeling.class_name(stem, "ForCausalLM"))
        config_class: Any = getattr(modeling, modeling.class_name(stem, "Config"))
        with quiet_transformers():
            config = config_class.from_pretrained(directory)
            tokenizer = AutoTokenizer.from_pretrained(directory, config=config)
            if before_weights is not None:
                before_weights(config, tokenizer)
            model, info = model_class.from_pretrained(directory, config=config, dtype=dtype, output_loading_info=True)
    except LpsearchError:
        raise
    except (SafetensorError, AttributeError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{directory}: cannot be loaded: {describe_error(error)}; export it again") from error
    check_loading(directory, info)
    model.to(device).requires_grad_(False)
    return model.eval(), tokenizer


def _read_config(directory: Path) -> dict[str, Any]:
    """Read ``config.json``; empty if there is none."""
    try:
        document = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
