"""The Markdown tables of ``paper.py``: accuracy of every variant, and step times mode by mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.paper_steps import UNMODIFIED

__all__ = ["build_tables"]

_MODES = ("eager", "graph", "compiled")
_WEIGHTS = {"refit": "refit", "distill": "refit and distilled"}


def build_tables(document: Mapping[str, Any]) -> str:
    """Lay out everything that was found; below the tables stand the hardware, the versions and the command."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    parts = []
    for found in document["models"]:
        parts += [_build_accuracy(found)] if "scores" in found["steps"] else []
        parts.append(_build_times(found))
    parts.append(f"{document['device']}; {versions}.")
    parts.append(f"`{document['command']}`")
    return "\n\n".join(parts) + "\n"


def _build_accuracy(found: Mapping[str, Any]) -> str:
    scores = found["steps"]["scores"]["result"]
    texts = list(scores["losses"][UNMODIFIED])
    tasks = [task for task in scores.get("tasks", []) if task["is_main"]]
    head = ["plan", "weights", "less depth"]
    head += [column for text in texts for column in (f"perplexity, {text}", "nats lost")]
    head += [f"{task['task']} ({task['metric']})" for task in tasks]
    rows = []
    for variant, losses in scores["losses"].items():
        name, _, method = variant.partition(", ")
        is_base = variant == UNMODIFIED
        reduction = "" if is_base else f"{found['plans'][name]['depth_reduction']:.1%}"
        cells = [name, "" if is_base else _WEIGHTS.get(method, "untouched"), reduction]
        for text in texts:
            loss = losses[text]
            cells += [_write(loss["perplexity"], ".3f"), "" if is_base else _write_delta(loss)]
        cells += [_write_score(task["scores"][variant]) for task in tasks]
        rows.append(cells)
    title = f"**{found['model']}**, {found['num_layers']} layers; ± is the standard error, of losses over windows."
    return "\n".join([title, "", *_build_table(head, rows)])


def _build_times(found: Mapping[str, Any]) -> str:
    if "times" not in found["steps"]:
        return f"Step times of {found['model']} are left out: {found['left_out_times']}."
    step = found["steps"]["times"]
    times, settings = step["result"], step["settings"]
    if not times["modes"]:
        return f"Step times of {found['model']} are left out: {times['left_out']}."
    modes = [mode for mode in _MODES if mode in times["modes"]]
    modes += [mode for mode in times["modes"] if mode not in modes]
    rows = [
        [name, *(_write_time(times["modes"][mode].get(name)) for mode in modes)]
        for name in (UNMODIFIED, *found["plans"])
    ]
    if "profile" in settings:
        where = f"estimated from a profile of {times['num_ranks']} x {times['device']}"
        where += ", one GPU standing for all" if times["emulated"] else ""
        workload = settings["profile"]["workloads"][0]
        kind = "a prompt" if workload["kind"] == "prefill" else "a decode step"
        missing = "; a profile has plans in one mode alone"
    else:
        where, workload, kind, missing = f"measured on {step['device']}", settings, "a decode step", ""
    title = (
        f"ms of {kind} of {found['model']}, {workload['batch_size']} x {workload['context_len']} tokens, {where} "
        f"({times['runtime']}); in brackets the speed-up against the unmodified model in the same mode{missing}."
    )
    return "\n".join([title, "", *_build_table(["plan", *modes], rows)])


def _build_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _write(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _write_delta(loss: Mapping[str, float | None]) -> str:
    error = loss["delta_nll_se"]
    return _write(loss["delta_nll"], "+.4f") + ("" if error is None else f" ± {error:.4f}")


def _write_score(score: Mapping[str, float | None]) -> str:
    error, retained = score["standard_error"], score.get("retained")
    written = _write(score["value"], ".3f") + ("" if error is None else f" ± {error:.3f}")
    return written + ("" if retained is None else f" ({retained:.0%} retained)")


def _write_time(time: Mapping[str, Any] | None) -> str:
    if time is None:
        return ""
    interval = f", {time['interval'][0]:.3f} to {time['interval'][1]:.3f}" if "interval" in time else ""
    speedup = "" if time["speedup"] == 1 else f" ({time['speedup']:.3f}x{interval})"
    return f"{time['latency_ms']:.3f}{speedup}"
