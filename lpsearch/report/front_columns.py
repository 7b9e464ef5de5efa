"""The table of a front, column by column, on a terminal as in reports."""

from __future__ import annotations

from collections.abc import Sequence

from lpsearch.config import Metric
from lpsearch.kinds import name_kinds
from lpsearch.search import KindLoss, Loss, TrialResult
from lpsearch.wording import format_value

__all__ = ["choose_kind_losses", "format_loss", "list_front_columns"]


def format_loss(loss: Loss | None, metric: Metric, *, digits: int = 4, sign: str = " ± ") -> str:
    """Write a loss by a metric, in nats per token, with its standard error; empty where there is none."""
    if loss is None:
        return ""
    return format_value(loss.get_cost(metric), loss.get_cost_se(metric), digits=digits, sign=sign)


def choose_kind_losses(front: Sequence[TrialResult]) -> tuple[list[tuple[KindLoss, ...]], bool]:
    """Return the losses by kind of text that a user is told: held out where those of all plans are known.

    Returns:
        For each plan one loss a kind, none where there is only one kind; and whether they are held out.
    """
    heldout = [() if result.heldout is None else result.heldout.by_kind for result in front]
    if all(heldout):
        return heldout, True
    return [result.loss.by_kind for result in front], False


def list_front_columns(
    front: Sequence[TrialResult], *, metric: Metric, digits: int = 4, sign: str = " ± ", by_kind: bool = True
) -> dict[str, list[str]]:
    """List what a table of a front says, column by column, one cell a plan; empty where a value is not known.

    Args:
        front: the unmodified model, then the plans that no other beats.
        metric: the loss that was searched.
        digits: digits of losses; perplexity and times have one less.
        sign: between a loss and its standard error.
        by_kind: list the losses by kind of text, where there are several.

    Returns:
        ``joins``, ``drops`` where branches are dropped, ``less depth``, ``loss``, ``held out``, ``on KIND`` for each of
        several kinds of text, ``delta nll`` where that is not the loss, ``unrepaired`` where losses are after a repair,
        ``perplexity``, and ``ms`` and ``speed-up`` where times are known.
    """

    def write(loss: Loss | None, metric: Metric = metric) -> str:
        return format_loss(loss, metric, digits=digits, sign=sign)

    has_drops = any(result.num_dropped for result in front)
    columns = {
        "joins": [str(result.num_joins) for result in front],
        **({"drops": [str(result.num_dropped) for result in front]} if has_drops else {}),
        "less depth": [f"{result.depth_reduction:.1%}" for result in front],
        "loss": [write(result.loss) for result in front],
        "held out": [write(result.get_heldout(metric)) for result in front],
    }
    if by_kind:
        kinds, _ = choose_kind_losses(front)
        for index, name in enumerate(name_kinds([part.kind.spec for part in kinds[0]])):
            columns[f"on {name}"] = [write(parts[index].loss) for parts in kinds]
    if metric == "kl":
        columns["delta nll"] = [write(result.loss, "nll") for result in front]
    if any(result.untouched is not None and not result.is_baseline for result in front):
        columns["unrepaired"] = [write(result.get_untouched(metric)) for result in front]
    columns["perplexity"] = [f"{result.perplexity:.{digits - 1}f}" for result in front]
    if front[0].latency_ms is not None:
        times, speedups = [result.latency_ms for result in front], [result.speedup for result in front]
        columns["ms"] = ["" if ms is None else f"{ms:.{digits - 1}f}" for ms in times]
        columns["speed-up"] = ["" if speedup is None else f"{speedup:.3f}x" for speedup in speedups]
    return columns
