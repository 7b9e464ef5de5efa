"""Exhaustive tables: the losses of all plans of a model, as ``enumerate_front.py`` writes them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpsearch.errors import ConfigError, DataError
from lpsearch.search import PlanSpace

__all__ = ["PlanLosses", "Table", "load_table", "save_table"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_FORM = (
    "arrays mask (integers, one for each plan), nll (floats, as many), L (number of layers) and optionally window_nll "
    "(floats, one row for each plan, whose mean is nll)"
)
_MEAN_TOLERANCE = 1e-3  # the losses were computed in bfloat16 or float32, averaged and stored as float32


@dataclass(frozen=True)
class PlanLosses:
    """The measured losses of plans.

    Attributes:
        masks: (plans,) the joins of each plan as bits, in ascending order, so that the baseline (0) comes first.
        window_nll: (plans, windows) nats per token.
        dropped_attention: (plans,) the layers whose attention is dropped, as bits; None where plans only join.
        dropped_mlp: the same of MLPs.
    """

    masks: IntArray
    window_nll: FloatArray
    dropped_attention: IntArray | None = None
    dropped_mlp: IntArray | None = None

    @property
    def nll(self) -> FloatArray:
        """(plans,) the mean loss over windows."""
        means: FloatArray = self.window_nll.mean(axis=1)
        return means


@dataclass(frozen=True)
class Table:
    """The losses of all plans of a space.

    Attributes:
        space: the plans to search; the table may lack some of them.
        masks: (plans,) the joins of each plan of the space as bits.
        nll: (plans,) losses in nats per token; ``worst_nll`` where a loss is not finite.
        window_nll: (plans, windows) losses of each window; one column, ``nll``, if the table has only means.
        worst_nll: the largest finite loss of the whole table; plans that the table lacks count as this.
    """

    space: PlanSpace
    masks: IntArray
    nll: FloatArray
    window_nll: FloatArray
    worst_nll: float

    @property
    def num_windows(self) -> int:
        """The number of windows with known losses."""
        return int(self.window_nll.shape[1])

    @cached_property
    def row_of_mask(self) -> dict[int, int]:
        """The row of each plan by its mask."""
        return {mask: row for row, mask in enumerate(self.masks.tolist())}

    def get_nll(self, mask: int) -> float:
        """Return the loss of a plan; ``worst_nll`` for a plan that the table lacks."""
        row = self.row_of_mask.get(mask)
        return self.worst_nll if row is None else float(self.nll[row])

    def get_window_nll(self, mask: int) -> FloatArray:
        """Return (windows,) the losses of a plan; ``worst_nll`` for a plan that the table lacks."""
        row = self.row_of_mask.get(mask)
        return np.full(self.num_windows, self.worst_nll) if row is None else self.window_nll[row]

    @cached_property
    def num_joins(self) -> IntArray:
        """(plans,) the number of joins of each plan."""
        return np.bitwise_count(self.masks).astype(np.int64)

    @property
    def max_joins(self) -> int:
        """The largest number of joins that counts: a third of the free layers."""
        num_free = self.space.num_layers - len(self.space.frozen_layers)
        return min(num_free // 3, int(self.num_joins.max()))

    @cached_property
    def least_nll(self) -> FloatArray:
        """(max_joins,) the least loss of a plan with at least k joins, k from 1."""
        return np.array([self.nll[self.num_joins >= k].min() for k in range(1, self.max_joins + 1)])

    @cached_property
    def missing_nll(self) -> FloatArray:
        """(max_joins,) the loss of a k without any found plan: the worst plan with exactly k joins, k from 1."""
        worst = [self.nll[self.num_joins == k] for k in range(1, self.max_joins + 1)]
        return np.array([values.max() if len(values) else self.worst_nll for values in worst])


def save_table(
    path: Path,
    losses: PlanLosses,
    *,
    num_layers: int,
    first_layer: int = 0,
    about: Mapping[str, Any],
    by_window: bool = False,
) -> None:
    """Write a table.

    Args:
        path: of the ``.npz`` file.
        losses: of all plans of a space.
        num_layers: number of layers in the table.
        first_layer: the model's layer that is layer 0 in the table.
        about: what was measured on what; values that JSON can hold.
        by_window: keep the loss of every window as well.
    """
    arrays = {"window_nll": losses.window_nll.astype(np.float32)} if by_window else {}
    dtype = np.int32 if num_layers <= 32 else np.int64
    for name in ("dropped_attention", "dropped_mlp"):
        bits = getattr(losses, name)
        if bits is not None:
            arrays[name] = (bits >> first_layer).astype(dtype)
    np.savez_compressed(
        path,
        mask=(losses.masks >> first_layer).astype(dtype),
        nll=losses.nll.astype(np.float32),
        L=np.int64(num_layers),
        about=np.array(json.dumps(about)),
        **arrays,
    )


def load_table(path: Path, *, frozen_layers: Sequence[int] = ()) -> Table:
    """Read a table.

    Args:
        path: the ``.npz`` file.
        frozen_layers: layers that the replayed searches leave alone; plans that join them are left out.

    Raises:
        DataError: for a file that is missing or of another form.
        ConfigError: for a frozen layer that does not exist, or if nothing is left to search.
    """
    arrays = _read_arrays(path)
    problem = _find_problem(**arrays)
    if problem:
        raise DataError(f"{path}: {problem}; expected {_FORM}, each plan once and the baseline (mask 0) among them")
    masks, nll, num_layers = arrays["masks"].astype(np.int64), arrays["nll"], arrays["num_layers"]
    window_nll = nll[:, None] if arrays["window_nll"] is None else arrays["window_nll"]
    finite = np.isfinite(nll) & np.isfinite(window_nll).all(axis=1)
    worst_nll = float(nll[finite].max())
    space = PlanSpace(int(num_layers), _find_max_group(masks), tuple(frozen_layers))
    free_bits = sum(1 << i for i in space.free_joins)
    kept = (masks & ~free_bits) == 0
    if kept.sum() < 2:
        raise ConfigError(f"{path}: holds no plan that leaves layers {list(frozen_layers)} alone; freeze fewer layers")
    return Table(
        space=space,
        masks=masks[kept],
        nll=np.where(finite, nll, worst_nll).astype(np.float64)[kept],
        window_nll=np.where(finite[:, None], window_nll, worst_nll).astype(np.float64)[kept],
        worst_nll=worst_nll,
    )


def _read_arrays(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            if "dropped_mlp" in archive:
                raise ValueError("its plans drop branches; replay it with studies/mixed_regret.py")
            masks, nll, num_layers = (np.asarray(archive[name]) for name in ("mask", "nll", "L"))
            window_nll = np.asarray(archive["window_nll"]) if "window_nll" in archive else None
    except FileNotFoundError:
        raise DataError(f"{path}: no such table; make one with studies/enumerate_front.py") from None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(f"{path}: not a table ({error}); expected an .npz file with {_FORM}") from None
    return {"masks": masks, "nll": nll, "num_layers": num_layers, "window_nll": window_nll}


def _find_problem(
    masks: NDArray[Any], nll: NDArray[Any], num_layers: NDArray[Any], window_nll: NDArray[Any] | None
) -> str | None:
    """Return what is wrong with the arrays of a table, or None."""
    if num_layers.ndim != 0 or num_layers.dtype.kind not in "iu" or not 2 <= int(num_layers) <= 63:
        return f"L is {num_layers!r}, not a number of layers from 2 to 63"
    if masks.ndim != 1 or masks.dtype.kind not in "iu" or nll.ndim != 1 or nll.dtype.kind != "f":
        return f"mask is {masks.dtype}{list(masks.shape)} and nll {nll.dtype}{list(nll.shape)}"
    if len(masks) != len(nll) or len(masks) < 2:
        return f"it has {len(masks)} masks and {len(nll)} losses"
    if masks.min() < 0 or int(masks.max()) >= 1 << (int(num_layers) - 1):
        return f"a mask is outside [0, 2^{int(num_layers) - 1})"
    if len(np.unique(masks)) != len(masks):
        return "it has a plan twice"
    if not (masks == 0).any() or not np.isfinite(nll[masks == 0]).all():
        return "it has no finite loss of the baseline"
    if window_nll is not None:
        return _find_window_problem(masks, nll, window_nll)
    return None


def _find_window_problem(masks: NDArray[Any], nll: NDArray[Any], window_nll: NDArray[Any]) -> str | None:
    if window_nll.ndim != 2 or window_nll.dtype.kind != "f" or len(window_nll) != len(nll) or window_nll.shape[1] < 1:
        return f"window_nll is {window_nll.dtype}{list(window_nll.shape)}"
    if not np.isfinite(window_nll[masks == 0]).all():
        return "it has no finite loss of the baseline on every window"
    finite = np.isfinite(nll) & np.isfinite(window_nll).all(axis=1)
    if np.abs(window_nll[finite].mean(axis=1, dtype=np.float64) - nll[finite]).max() > _MEAN_TOLERANCE:
        return "nll is not the mean of window_nll"
    return None


def _find_max_group(masks: IntArray) -> int:
    """Return the most layers in a group of any plan: the longest run of ones, plus one."""
    max_group, runs = 1, masks
    while runs.any():
        max_group += 1
        runs = runs & (runs >> 1)
    return max(2, max_group)
