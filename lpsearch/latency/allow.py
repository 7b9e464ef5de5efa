"""What a plan may do to a model, as far as times must be known of it: join layers, drop attentions, drop MLPs.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from lpsearch.errors import ConfigError

__all__ = ["DROPS", "JOINS", "parse_allow"]

JOINS = frozenset({"joins"})
DROPS = frozenset({"drop-attention", "drop-mlp"})

_MEANINGS = {"joins": JOINS, "drops": DROPS, **{name: frozenset({name}) for name in DROPS}}


def parse_allow(words: str | Iterable[str]) -> frozenset[str]:
    """Parse what ``--allow`` says, e.g. ``joins,drops``.

    Args:
        words: ``joins``, ``drops``, ``drop-attention`` and ``drop-mlp``, between commas or one by one.

    Returns:
        Which of ``joins``, ``drop-attention`` and ``drop-mlp`` a plan may do.

    Raises:
        ConfigError: for another word, or none.
    """
    listed = words.split(",") if isinstance(words, str) else list(words)
    allowed: set[str] = set()
    for word in listed:
        if word.strip() not in _MEANINGS:
            raise ConfigError(f"--allow {','.join(listed)}: {word.strip()!r} is none of {', '.join(_MEANINGS)}")
        allowed |= _MEANINGS[word.strip()]
    if not allowed:
        raise ConfigError(f"--allow is empty; give some of {', '.join(_MEANINGS)}")
    return frozenset(allowed)
