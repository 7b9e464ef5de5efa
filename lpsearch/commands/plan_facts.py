"""Plans as a person reads them: one plan of a file or of a front, and what two plans differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group

from lpsearch.commands.facts import Facts, Grid, Row, wrap_line
from lpsearch.config import Metric
from lpsearch.front_file import FrontFile, FrontPoint
from lpsearch.kinds import name_kinds
from lpsearch.latency.profile import describe_estimate
from lpsearch.models.aliases import describe_artefact, name_model
from lpsearch.plan import KindMetrics, LatencyMetrics, Plan, ProxyMetrics, RecoveredLoss
from lpsearch.wording import (
    describe_changes,
    describe_layers,
    describe_origin,
    describe_speedup,
    format_value,
    name_count,
)

__all__ = ["describe_difference", "describe_pick", "describe_plan", "list_loss_rows"]

_SPLITS = {"proxy": "searched on", "heldout": "held out"}


def describe_plan(plan: Plan, path: Path) -> Facts:
    """Lay out what a plan file says.

    Args:
        plan: as it was loaded.
        path: its file.
    """
    assert plan.metadata is not None  # a plan file has it
    metadata = plan.metadata
    provenance = metadata.provenance
    rows: list[Row] = [("plan", path), *_list_choice_rows(plan)]
    rows.append(("model", describe_artefact(metadata.model.id, metadata.model.revision)))
    for split in ("proxy", "heldout"):
        measured = getattr(metadata.metrics, split)
        rows += [(_SPLITS[split], "not measured")] if measured is None else list_loss_rows(measured, _SPLITS[split])
    rows += _list_latency_rows(metadata.metrics.latency)
    if (recovery := provenance.recovery) is not None:
        rows.append(("repair", f"{recovery.method}, {recovery.num_tokens:,} tokens of {', '.join(recovery.data)}"))
        rows += _list_recovered_rows(recovery.losses)
    found_by = None if provenance.trial is None else f"trial {provenance.trial} of the study {provenance.study}"
    return Facts([*rows, ("found by", found_by), ("written", provenance.created_at)])


def describe_pick(point: FrontPoint, path: Path, file: FrontFile, *, ways: Mapping[str, str]) -> Group:
    """Lay out the plan that was picked of a front.

    Args:
        point: the plan.
        path: its file.
        file: the front.
        ways: what joins alone, drops alone and both save; empty where that was not compared.
    """
    metric = file.metric or "nll"
    losses = (
        ("proxy", (point.delta_nll, point.delta_nll_se, point.kl_nats_per_token, point.kl_se)),
        (
            "heldout",
            (
                point.heldout_delta_nll,
                point.heldout_delta_nll_se,
                point.heldout_kl_nats_per_token,
                point.heldout_kl_se,
            ),
        ),
    )
    rows: list[Row] = [("plan", path), ("model", name_model(file.model.id))]
    rows += _list_choice_rows(Plan.from_groups(point.groups, dropped=point.dropped))
    for split, found in losses:
        words = _write_losses(*found, metric=metric) or "not measured"
        rows.append((_SPLITS[split], words + f", perplexity {point.perplexity:.2f}" * (split == "proxy")))
    if point.speedup is not None and point.latency_ms is not None:
        speedup = describe_speedup(point.speedup, file.speedup_margin)
        rows.append(("speed-up", f"{speedup}, {point.latency_ms:.3f} ms"))
    rows.append(("state", None if file.finished else "unfinished: the search is under way or was interrupted"))
    rows.append(("found by", f"{describe_origin(point.origin)}, trial {point.trial} of the study {file.study}"))
    if not ways:
        return Group(Facts(rows))
    names = {"joins": "joins alone", "drops": "drops alone", "both": "both"}
    compared = Facts([(f"  {names[name]}", words) for name, words in ways.items()])
    return Group(Facts(rows), "", wrap_line("Within the loss, of all plans of the study:", "bold"), compared)


def describe_difference(difference: Mapping[str, Any], first: Path, second: Path) -> Group:
    """Lay out the joins and drops that only one of two plans has, and those of both.

    Args:
        difference: layers by choice and place, as ``plan diff`` prints them.
        first: file of the first plan.
        second: file of the other.
    """
    places = ("only_in_first", "only_in_second", "in_both")
    choices = {"joins": [difference[f"joins_{place}"] for place in places]}
    for branch, name in (("attention", "attentions dropped"), ("mlp", "MLPs dropped")):
        choices[name] = [difference[f"dropped_{place}"][branch] for place in places]
    rows = [
        (name, *(", ".join(map(str, layers)) or "none" for layers in cells))
        for name, cells in choices.items()
        if name == "joins" or any(cells)
    ]
    table = Grid(("layers", *(place.replace("_", " ") for place in places)), rows, left=("layers",))
    files = Facts([("first", first), ("second", second)])
    return Group(files, "", table, wrap_line("A join is named by the first of its two layers.", "dim"))


def list_loss_rows(measured: ProxyMetrics, name: str) -> list[Row]:
    """Write a loss, its parts by kind of text, and what it was measured on.

    Args:
        measured: the loss.
        name: of the first row.
    """
    after = "" if measured.variant == "raw" else f", after {measured.variant}"
    losses = _write_losses(measured.delta_nll, measured.delta_nll_se, measured.kl_nats_per_token, None)
    rows: list[Row] = [(name, f"{losses}, perplexity {measured.perplexity:.2f}{after}")]
    kinds: Sequence[KindMetrics] = measured.by_kind
    for kind, part in zip(name_kinds([part.data for part in kinds]), kinds, strict=True):
        losses = _write_losses(part.delta_nll, part.delta_nll_se, part.kl_nats_per_token, part.kl_se)
        rows.append((f"  on {kind}", losses))
    where = f"{name_count(measured.windows, 'window')} of {measured.seq_len:,} tokens of {measured.data}"
    return [*rows, ("", f"on {where}, {measured.dtype} on {measured.device}")]


def _list_choice_rows(plan: Plan) -> list[Row]:
    changes = "none, the unmodified model"
    if plan.num_joins or plan.num_dropped:
        changes = f"{describe_changes(plan)}: {describe_layers(plan)}"
    depth = f"{plan.depth:g} of {plan.num_layers} layers, {plan.depth_reduction:.1%} less"
    return [("changes", changes), ("depth", depth)]


def _write_losses(
    delta_nll: float | None,
    delta_nll_se: float | None,
    kl_nats_per_token: float | None,
    kl_se: float | None,
    *,
    metric: Metric = "nll",
) -> str | None:
    """Write the losses in nats per token, the one that was searched first; None where they were not measured."""
    if delta_nll is None:
        return None
    parts = [f"delta nll {format_value(delta_nll, delta_nll_se)}"]
    if kl_nats_per_token is not None:
        parts.append(f"kl {format_value(kl_nats_per_token, kl_se)}")
    return ", ".join(reversed(parts) if metric == "kl" else parts)


def _list_latency_rows(latency: LatencyMetrics | None) -> list[Row]:
    if latency is None:
        return [("speed-up", "not known, latency was off")]
    how = "measured" if latency.kind == "measured" else describe_estimate(latency.mean_error)
    times = f"{latency.latency_ms:.3f} ms for {latency.baseline_latency_ms:.3f} ms"
    workload = latency.workload or f"decoding, batch {latency.batch_size}, {latency.context_len:,} cached tokens"
    rows: list[Row] = [
        ("speed-up", f"{latency.speedup:.3f}x {how}, {times}"),
        ("", f"{workload}, {latency.dtype} on {latency.device}"),
    ]
    cached, whole = latency.kv_bytes_per_token, latency.baseline_kv_bytes_per_token
    if cached is not None:
        other = "" if whole is None else f", for {whole:,} of the unmodified model"
        rows.append(("KV cache", f"{cached:,} bytes a token{other}"))
    return rows


def _list_recovered_rows(losses: Sequence[RecoveredLoss]) -> list[Row]:
    names = name_kinds([loss.data for loss in losses])
    return [
        (
            f"  on {name}",
            f"delta nll {loss.untouched_delta_nll:.4f} before, {format_value(loss.delta_nll, loss.delta_nll_se)} after",
        )
        for name, loss in zip(names, losses, strict=True)
    ]
