"""What is refused before a GGUF file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpsearch.errors import FamilyError, UsageError
from lpsearch.export.gguf.formats import QUANTISATIONS
from lpsearch.models.traits import read_traits
from lpsearch.transform.deci import find_deci_obstacle

__all__ = ["check_gguf", "check_gguf_target", "check_quantisation"]


def check_gguf(config: Any) -> None:
    """Refuse a model that llama.cpp's ``deci`` would compute otherwise.

    Args:
        config: a transformers configuration.

    Raises:
        FamilyError: with the reason.
    """
    traits = read_traits(config)
    obstacle = find_deci_obstacle(traits)
    if obstacle is not None:
        raise FamilyError(
            f"model type {traits.config.model_type} cannot be written as a GGUF file: {obstacle}. The one "
            "architecture of llama.cpp whose blocks may differ in size (deci) computes Llama's layer; for transformers "
            "and vLLM, `lpsearch export PLAN DIR` writes a directory"
        )


def check_gguf_target(target: Path) -> None:
    """Refuse a file that exists, or whose name does not say what it is.

    Raises:
        UsageError: if it is such a one.
    """
    if target.suffix != ".gguf":
        raise UsageError(f"{target}: the name of a GGUF file ends in .gguf; name such a file")
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} exists; name a new file, or remove this one")


def check_quantisation(quantisation: str | None) -> None:
    """Refuse a quantisation that is not written.

    Raises:
        UsageError: naming those that are.
    """
    if quantisation is not None and quantisation not in QUANTISATIONS:
        raise UsageError(
            f"quantisation {quantisation!r} is none that is written; choose one of {', '.join(QUANTISATIONS)}, and "
            "llama.cpp's `llama-quantize` makes others of a file in f16 or f32"
        )
