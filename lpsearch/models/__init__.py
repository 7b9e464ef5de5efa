"""Models: what ``--model`` means, fetching and loading it, and telling one model from another.

What needs no torch (aliases, sources) is imported at once, the rest when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lpsearch.models.aliases import Alias, list_aliases
from lpsearch.models.cache import cache_directory
from lpsearch.models.sources import ModelSource, resolve_source

if TYPE_CHECKING:
    from lpsearch.models.families import get_decoder_layers
    from lpsearch.models.fingerprint import check_parts, fingerprint_model, fingerprint_parts, fingerprints_match
    from lpsearch.models.geometry import find_max_positions, load_geometry
    from lpsearch.models.loading import LoadedModel, load_model
    from lpsearch.models.tokenizer_check import check_baseline_nll, check_tokenizer, needs_bos

__all__ = [
    "Alias",
    "LoadedModel",
    "ModelSource",
    "cache_directory",
    "check_baseline_nll",
    "check_parts",
    "check_tokenizer",
    "find_max_positions",
    "fingerprint_model",
    "fingerprint_parts",
    "fingerprints_match",
    "get_decoder_layers",
    "list_aliases",
    "load_geometry",
    "load_model",
    "needs_bos",
    "resolve_source",
]

_MODULE_OF = {
    "LoadedModel": "loading",
    "check_baseline_nll": "tokenizer_check",
    "check_parts": "fingerprint",
    "check_tokenizer": "tokenizer_check",
    "find_max_positions": "geometry",
    "fingerprint_model": "fingerprint",
    "fingerprint_parts": "fingerprint",
    "fingerprints_match": "fingerprint",
    "get_decoder_layers": "families",
    "load_geometry": "geometry",
    "load_model": "loading",
    "needs_bos": "tokenizer_check",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
