"""The texts of ``lpsearch recover``: those to fit to, and others to measure on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lpsearch.commands.plan_texts import check_texts_of_plan
from lpsearch.commands.steps import show_steps
from lpsearch.kinds import TextKind, list_measured_kinds, write_kind
from lpsearch.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lpsearch.data import Windows
    from lpsearch.models import LoadedModel

__all__ = ["RecoveryTexts", "choose_kinds", "find_seq_len"]


@dataclass(frozen=True)
class RecoveryTexts:
    """The texts to fit to and to measure on.

    Attributes:
        kinds: to fit to.
        heldout: to measure on; of a text in both, the windows after those that were fitted.
        num_windows: to fit to, of each kind.
        seq_len: tokens in a window.
        seed: of sampled text.
    """

    kinds: tuple[TextKind, ...]
    heldout: tuple[TextKind, ...]
    num_windows: int
    seq_len: int
    seed: int
    _fitted: dict[str, Windows] = field(default_factory=dict, init=False, repr=False)
    _unseen: dict[str, Windows] = field(default_factory=dict, init=False, repr=False)

    @property
    def num_unseen(self) -> int:
        """Windows to measure on, of each kind: a quarter as many, but at most 64."""
        return min(64, max(1, self.num_windows // 4))

    def check(self) -> None:
        """Check that the texts are there, before anything is loaded.

        Raises:
            DataError: if one is not, or holds no text.
        """
        from lpsearch.data import check_text_kinds

        check_text_kinds(list(map(write_kind, self.kinds)), split="proxy")
        check_text_kinds(list(map(write_kind, self.heldout)), split="heldout")

    def check_config(self, config: Any) -> None:
        """Refuse windows that are longer than the model reads.

        Raises:
            DataError: if they are.
        """
        from lpsearch.data import check_seq_len

        check_seq_len(self.seq_len, config)

    def read(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Build what needs the tokenizer alone, so that a text that is too short ends this before weights are read.

        Raises:
            DataError: if a text is too short.
            SourceError: if one cannot be fetched now.
        """
        from lpsearch.data import build_text_windows

        options: dict[str, Any] = {"tokenizer": tokenizer, "seq_len": self.seq_len}
        self._fitted.update(build_text_windows(self.kinds, num_windows=self.num_windows, split="proxy", **options))
        after = list(self._fitted.values())
        self._unseen.update(
            build_text_windows(self.heldout, num_windows=self.num_unseen, split="heldout", after=after, **options)
        )

    def build(self, loaded: LoadedModel) -> tuple[Windows, Windows]:
        """Build the windows to fit to, and others to measure on; only what was not read before."""
        from lpsearch.data import build_mixed_windows

        options: dict[str, Any] = {
            "tokenizer": loaded.tokenizer, "seq_len": self.seq_len, "seed": self.seed, "model": loaded.model
        }  # fmt: skip
        with show_steps("preparing windows to fit to") as on_progress:
            calibration = build_mixed_windows(
                self.kinds,
                num_windows=self.num_windows,
                split="proxy",
                built=self._fitted,
                on_progress=on_progress,
                **options,
            )
        with show_steps("preparing windows to measure on") as on_progress:
            unseen = build_mixed_windows(
                self.heldout,
                num_windows=self.num_unseen,
                split="heldout",
                after=calibration,
                built=self._unseen,
                on_progress=on_progress,
                **options,
            )
        return calibration, unseen


def choose_kinds(plan: Plan) -> tuple[TextKind, ...]:
    """Return the kinds of text that the plan was searched on, and text sampled from the model."""
    measured = plan.metadata.metrics.proxy if plan.metadata is not None else None
    if measured is None:
        return (TextKind("wikitext2"), TextKind("self"))
    kinds = list_measured_kinds(measured)
    check_texts_of_plan(kinds)
    return tuple(kinds if any(kind.spec == "self" for kind in kinds) else [*kinds, TextKind("self")])


def find_seq_len(plan: Plan) -> int:
    """Return the length of the windows that the plan was searched on, in tokens."""
    measured = plan.metadata.metrics.proxy if plan.metadata is not None else None
    return 2048 if measured is None else measured.seq_len
