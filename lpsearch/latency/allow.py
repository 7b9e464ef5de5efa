"""What a plan may do to a model, as far as times must be known of it: join layers, drop attentions, drop MLPs.

The words are those of :data:`lpsearch.config.Allowed`. This module imports no torch.
"""

from __future__ import annotations

__all__ = ["DROPS", "JOINS"]

JOINS = frozenset({"joins"})
DROPS = frozenset({"drop-attention", "drop-mlp"})
