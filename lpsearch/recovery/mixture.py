"""Which windows of which kind of text a training step sees."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lpsearch.data import Windows
from lpsearch.errors import DataError

__all__ = ["Mixture"]

_GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True, eq=False)
class Mixture:
    """Windows of several kinds of text, and how often each kind comes.

    It takes several, since nothing holds the weights to what they do on a kind that they are not shown.

    Attributes:
        windows: by kind, all of one length.
        weights: by kind, the shares of the tokens in any unit; those left out count 1.
    """

    windows: Mapping[str, Windows]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the kinds go together.

        Raises:
            DataError: without a kind, for windows of several lengths, or for impossible weights.
        """
        lengths = {kind: windows.seq_len for kind, windows in self.windows.items()}
        if not lengths:
            raise DataError("there is no text to train on; give at least one kind of text")
        if len(set(lengths.values())) > 1:
            raise DataError(f"the kinds of text have windows of {lengths} tokens; build them with one length")
        if unknown := sorted(set(self.weights) - set(lengths)):
            raise DataError(f"a weight is for {unknown[0]!r}; the kinds of text are {', '.join(lengths)}")
        for kind, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise DataError(f"the weight of {kind!r} is {weight}; expected a positive number")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of text, in order."""
        return tuple(self.windows)

    @property
    def seq_len(self) -> int:
        """Tokens in a window."""
        return next(iter(self.windows.values())).seq_len

    @property
    def sha256(self) -> str:
        """Hash of every kind's name, share and tokens."""
        parts = [f"{kind}:{self.weights.get(kind, 1.0)}:{windows.sha256}" for kind, windows in self.windows.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def schedule(self, num_steps: int, windows_per_step: int, *, seed: int) -> npt.NDArray[np.int64]:
        """Choose the windows of every step.

        A step's windows depend on the seed and the step alone, not on the number of steps. Kinds follow a sequence of
        low discrepancy (multiples of the golden ratio, modulo 1), so that every few steps hold every kind in its share;
        of a kind, every window comes once before any comes again, each time in another order.

        Args:
            num_steps: steps to choose for.
            windows_per_step: windows in each.
            seed: of the orders.

        Returns:
            (steps, windows per step, 2): number of the kind, and of the window within it.
        """
        shares = np.array([self.weights.get(kind, 1.0) for kind in self.kinds])
        bounds = np.cumsum(shares / shares.sum())
        start = np.random.default_rng([seed, 0]).random()
        places = (start + _GOLDEN_RATIO * np.arange(num_steps * windows_per_step)) % 1.0
        kinds = np.minimum(np.searchsorted(bounds, places, side="right"), len(bounds) - 1)
        chosen = np.empty_like(kinds)
        for number, windows in enumerate(self.windows.values()):
            is_kind = kinds == number
            count = int(is_kind.sum())
            rounds = range(-(-count // windows.num_windows))
            orders = [np.random.default_rng([seed, 1, number, r]).permutation(windows.num_windows) for r in rounds]
            if orders:
                chosen[is_kind] = np.concatenate(orders)[:count]
        return np.stack([kinds, chosen], axis=-1).reshape(num_steps, windows_per_step, 2).astype(np.int64)

    def gather(self, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens of some windows, (windows, seq).

        Args:
            chosen: (windows, 2), rows of :meth:`schedule`.
        """
        kinds = list(self.windows.values())
        return np.stack([kinds[kind].input_ids[window] for kind, window in chosen]).astype(np.int64)
