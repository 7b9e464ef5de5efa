"""What lpsearch knows of each model family: one entry a family, read together with a configuration.

A :class:`Family` is the entry. It says what transformers' code of a model type does and its configuration does not say:
which submodule is which norm, what is packed into one projection, where the heads are when queries are normed.
:func:`read_traits` joins it with a configuration to :class:`FamilyTraits`, which everything else asks: the decoder
blocks, fusing, export, the modelling file (through the exported configuration), the latency runtime, the vLLM plugin
and fingerprints. To add a family is to add its entry to :data:`~lpsearch.models.traits.entries.FAMILIES`.

This package imports neither torch nor transformers.
"""

from lpsearch.models.traits.entries import FAMILIES, OUTPUTS, BlockForm, Family, Projection, list_fusible_families
from lpsearch.models.traits.reading import LAYER_LISTS, AttentionKind, AttentionPart, FamilyTraits, read_traits

__all__ = [
    "FAMILIES",
    "LAYER_LISTS",
    "OUTPUTS",
    "AttentionKind",
    "AttentionPart",
    "BlockForm",
    "Family",
    "FamilyTraits",
    "Projection",
    "list_fusible_families",
    "read_traits",
]
