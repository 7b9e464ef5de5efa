"""Evaluate every plan of a model on fixed windows, and keep the losses in a table on which searches can be replayed.

Plans share prefixes, and the script runs each prefix once: a space of pairs costs 1.6 layers and one pair for each
plan, whatever the depth. Each layer has a queue of prefixes that end at it. The script always runs the deepest queue
that fills a batch. So the walk is depth first, few hidden states exist at a time, and the device gets batches large
enough for its full speed without any captured graph. The output head, half of the work of a small model, runs on
batches of whole plans.

The table has the arrays ``mask`` (integers; bit i set: layers i and i + 1 are joined), ``nll`` float32 in nats per
token, ``L`` (number of layers) and ``about`` (JSON: what was measured on what). ``--by-window`` adds ``window_nll``
float32 (plans, windows), so that a search with racing can be replayed. ``--layers A-B`` groups only layers A to B, both
included. Replay such a table with the other layers frozen, or write it with ``--renumber`` as the table of a model of
those layers alone. ``--allow joins,drops`` also drops branches of these layers; the table then has the arrays
``dropped_attention`` and ``dropped_mlp`` (integers; bit i set: that branch of layer i is dropped), and
``mixed_regret.py`` replays it. ``--data`` takes a text, as ``lpsearch optimize`` does, or tokens that
``windows_file.py`` wrote.

    python studies/enumerate_front.py --model smollm2-135m --data wikitext2 --windows 4 --seq-len 512 --layers 2-28 \
        --device cuda --out smollm2-135m.npz
    python studies/enumerate_front.py --model smollm2-135m --data text.txt --windows 4 --seq-len 64 --layers 20-24 \
        --allow joins,drops --renumber --device cpu --out smollm2-135m-drops.npz
    python studies/enumerate_front.py --model smollm2-135m --data windows.npz --layers 4-27 --renumber --by-window \
        --device cuda --out smollm2-135m-by-window.npz
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.commands.loading import describe_device, resolve_device
from lpsearch.commands.outputs import check_output_file
from lpsearch.config import Allowed, parse_allowed, parse_layer_list
from lpsearch.data import Windows
from lpsearch.errors import ConfigError, LpsearchError
from lpsearch.models import load_model, resolve_source
from lpsearch.models.families import build_blocks, check_family
from lpsearch.plan import Group
from lpsearch.search import PlanSpace
from studies.plan_batches import capture_inputs, run_head, run_layers
from studies.tables import PlanLosses, save_table
from studies.windows_file import get_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
_LOGIT_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_REPORT_EVERY_S = 15.0


@dataclass(frozen=True)
class Space:
    """The plans to walk.

    Attributes:
        num_layers: of the model.
        first_layer: first layer that may be grouped.
        stop_layer: one more than the last layer that may be grouped.
        max_group: most layers in a group.
        max_joins: most joins of a plan; None for no limit.
        allow: what a plan may do, as in :class:`lpsearch.search.PlanSpace`.
    """

    num_layers: int
    first_layer: int
    stop_layer: int
    max_group: int = 2
    max_joins: int | None = None
    allow: tuple[Allowed, ...] = ("joins",)

    def list_groups(self, layer_idx: int) -> tuple[Group, ...]:
        """Return the groups that may begin at a layer."""
        return self._plans.list_groups(layer_idx)

    @cached_property
    def _plans(self) -> PlanSpace:
        frozen = (i for i in range(self.num_layers) if not self.first_layer <= i < self.stop_layer)
        return PlanSpace(self.num_layers, self.max_group, tuple(frozen), self.allow)

    def count_plans(self) -> int:
        """Count the plans, the baseline included."""
        max_joins = self.num_layers if self.max_joins is None else self.max_joins
        counts = [[0] * (max_joins + 1) for _ in range(self.num_layers + 1)]
        counts[0][0] = 1
        for layer_idx in range(self.num_layers):
            for size in map(len, self.list_groups(layer_idx)):
                for num_joins in range(max_joins + 2 - size):
                    counts[layer_idx + size][num_joins + size - 1] += counts[layer_idx][num_joins]
        return sum(counts[-1])


@dataclass
class _PrefixQueue:
    """A queue of prefixes that end at the same layer: their bits and hidden states (plans, windows, seq, hidden)."""

    chunks: deque[tuple[list[int], Tensor]] = field(default_factory=deque)
    size: int = 0

    def push(self, masks: list[int], hidden_states: Tensor) -> None:
        """Add prefixes to the end."""
        self.chunks.append((masks, hidden_states))
        self.size += len(masks)

    def take(self, count: int) -> tuple[list[int], Tensor]:
        """Remove up to ``count`` prefixes from the front, and return them."""
        masks: list[int] = []
        parts = []
        while self.chunks and len(masks) < count:
            chunk_masks, hidden_states = self.chunks.popleft()
            room = count - len(masks)
            if len(chunk_masks) > room:
                self.chunks.appendleft((chunk_masks[room:], hidden_states[room:]))
            masks += chunk_masks[:room]
            parts.append(hidden_states[:room])
        self.size -= len(masks)
        return masks, parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.inference_mode()
def enumerate_losses(
    model: PreTrainedModel,
    windows: Windows,
    space: Space,
    *,
    batch_plans: int | None = None,
    compile_loss: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> PlanLosses:
    """Return the losses of every plan of a space.

    Args:
        model: the unmodified model, in eval mode.
        windows: what to evaluate on.
        space: which plans.
        batch_plans: prefixes in one forward of a layer; None means 2048 tokens on a CPU and 65536 on a GPU.
        compile_loss: compile the loss, so that float32 logits never exist in memory.
        on_progress: called with the number of plans done.
    """
    check_family(model)
    blocks = build_blocks(model)
    input_ids = torch.tensor(windows.input_ids, dtype=torch.long, device=model.device)  # (windows, seq)
    head_bytes = input_ids.numel() * model.config.get_text_config().vocab_size * model.dtype.itemsize
    head_plans = max(1, _LOGIT_BYTES[model.device.type] // head_bytes)
    layer_plans = batch_plans or max(1, _BATCH_TOKENS[model.device.type] // windows.input_ids.size)
    batch_sizes = [layer_plans] * space.num_layers + [head_plans]
    embedded, layer_kwargs = capture_inputs(model, input_ids)
    compute_losses = torch.compile(_compute_losses, dynamic=True) if compile_loss else _compute_losses
    queues = [_PrefixQueue() for _ in range(space.num_layers + 1)]
    queues[0].push([0], embedded[None])
    done = _Collector(on_progress)
    pending: deque[tuple[list[int], Tensor]] = deque()
    while (layer_idx := _choose_queue(queues, batch_sizes)) is not None:
        masks, hidden_states = queues[layer_idx].take(batch_sizes[layer_idx])
        if layer_idx == space.num_layers:
            pending.append((masks, compute_losses(run_head(model, hidden_states), input_ids)))
            if len(pending) > 1:  # the device stays one batch ahead of what is read from it
                done.collect(*pending.popleft())
            continue
        for group in space.list_groups(layer_idx):
            bits = _encode_group(group, space.num_layers)
            kept = _find_within(masks, len(group) - 1, space)
            if kept:
                members = [
                    replace(blocks[i], runs_attention=i in group.attention_layers, runs_mlp=i in group.mlp_layers)
                    for i in group
                ]
                inputs = hidden_states if len(kept) == len(masks) else hidden_states[kept]
                outputs = run_layers(members, inputs, [layer_kwargs[i] for i in group], is_changed=group.is_changed)
                queues[layer_idx + len(group)].push([masks[row] | bits for row in kept], outputs)
    for batch in pending:
        done.collect(*batch)
    return done.build_losses(space)


def _encode_group(group: Group, num_layers: int) -> int:
    """Return a group's bits: its joins, above them the attentions that it drops, above them the MLPs."""
    joins = sum(1 << i for i in group[:-1])
    attention = sum(1 << i for i in group if i not in group.attention_layers)
    mlp = sum(1 << i for i in group if i not in group.mlp_layers)
    return joins | attention << num_layers | mlp << 2 * num_layers


def _choose_queue(queues: Sequence[_PrefixQueue], batch_sizes: Sequence[int]) -> int | None:
    """Return the deepest queue that fills a batch, else the shallowest that holds anything, else None."""
    waiting = [layer_idx for layer_idx, queue in enumerate(queues) if queue.size]
    full = [layer_idx for layer_idx in waiting if queues[layer_idx].size >= batch_sizes[layer_idx]]
    return full[-1] if full else min(waiting, default=None)


def _find_within(masks: Sequence[int], added_joins: int, space: Space) -> list[int]:
    """Return the rows whose plans have at most ``max_joins`` joins after that many are added."""
    if space.max_joins is None:
        return list(range(len(masks)))
    joins = (1 << space.num_layers) - 1
    return [row for row, mask in enumerate(masks) if (mask & joins).bit_count() + added_joins <= space.max_joins]


def _compute_losses(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Return (plans, windows) losses in nats per token of logits (plans, windows, seq, vocab)."""
    scores = logits[:, :, :-1].float()
    targets = input_ids[:, 1:, None].expand(scores.shape[0], -1, -1, 1)  # (plans, windows, seq - 1, 1)
    losses = torch.logsumexp(scores, dim=-1) - torch.gather(scores, -1, targets)[..., 0]
    return losses.double().mean(dim=2)


class _Collector:
    """Reads the losses of batches of plans from the device."""

    def __init__(self, on_progress: Callable[[int], None] | None) -> None:
        self._on_progress = on_progress
        self._masks: list[int] = []
        self._window_nll: list[NDArray[np.float64]] = []

    def collect(self, masks: Sequence[int], window_nll: Tensor) -> None:
        """Read one batch, (plans, windows)."""
        self._masks += masks
        self._window_nll.append(window_nll.cpu().numpy())
        if self._on_progress is not None:
            self._on_progress(len(self._masks))

    def build_losses(self, space: Space) -> PlanLosses:
        """Return all that was collected, plans of the same drops together."""
        order = sorted(range(len(self._masks)), key=self._masks.__getitem__)
        window_nll = np.concatenate(self._window_nll)[order]
        bits = [self._masks[row] for row in order]
        low = (1 << space.num_layers) - 1
        masks = np.array([value & low for value in bits], dtype=np.int64)
        if space.allow == ("joins",):
            return PlanLosses(masks, window_nll)
        dropped = [np.array([value >> n * space.num_layers & low for value in bits], dtype=np.int64) for n in (1, 2)]
        return PlanLosses(masks, window_nll, *dropped)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a table, and return the exit code."""
    options = _build_parser().parse_args(arguments)
    try:
        print(json.dumps(_run(options)))
    except LpsearchError as error:
        print(f"enumerate_front: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    if options.out.suffix != ".npz":
        raise ConfigError(f"--out {options.out}: name an .npz file")
    check_output_file(options.out)
    device = resolve_device(options.device)
    loaded = load_model(resolve_source(options.model), device=device, dtype=getattr(torch, options.dtype))
    space = _build_space(options, loaded.identity.num_layers)
    windows = get_windows(options.data, loaded, num_windows=options.windows, seq_len=options.seq_len)
    num_plans = space.count_plans()
    print(f"{options.model}: {num_plans} plans of layers {space.first_layer} to {space.stop_layer - 1}", flush=True)
    began_at = time.monotonic()
    losses = enumerate_losses(
        loaded.model,
        windows,
        space,
        batch_plans=options.batch_plans,
        compile_loss=device.type == "cuda",
        on_progress=_Reporter(num_plans, began_at),
    )
    elapsed_s = time.monotonic() - began_at
    about = {
        "model": loaded.identity.model_dump(),
        "data": windows.spec,
        "windows": windows.num_windows,
        "seq_len": windows.seq_len,
        "windows_sha256": windows.sha256,
        "dtype": options.dtype,
        "device": describe_device(device),
        "layers": [space.first_layer, space.stop_layer],
        "max_group": space.max_group,
        "max_joins": space.max_joins,
        "allow": list(space.allow),
        "torch": torch.__version__,
    }
    renumbered = {"first_layer": space.first_layer, "num_layers": space.stop_layer - space.first_layer}
    layers = renumbered if options.renumber else {"num_layers": space.num_layers}
    save_table(options.out, losses, about=about, by_window=options.by_window, **layers)
    _print_front(losses)
    return {
        "table": str(options.out),
        "plans": len(losses.masks),
        "baseline_nll": float(losses.nll[0]),
        "elapsed_s": elapsed_s,
        "plans_per_s": len(losses.masks) / elapsed_s,
        **about,
    }


def _build_space(options: argparse.Namespace, num_layers: int) -> Space:
    try:
        layers = parse_layer_list(options.layers or f"0-{num_layers - 1}")
    except ValueError as error:
        raise ConfigError(f"--layers: {error}") from None
    if len(layers) < 2 or layers != tuple(range(layers[0], layers[-1] + 1)) or layers[-1] >= num_layers:
        raise ConfigError(
            f"--layers {options.layers}: the model has layers 0 to {num_layers - 1}; name a range of at least two"
        )
    if options.max_group < 2 or (options.max_joins is not None and options.max_joins < 1):
        raise ConfigError("--max-group must be at least 2 and --max-joins at least 1")
    try:
        allow = parse_allowed([options.allow])
    except ValueError as error:
        raise ConfigError(f"--allow: {error}") from None
    return Space(num_layers, layers[0], layers[-1] + 1, options.max_group, options.max_joins, allow)


@dataclass
class _Reporter:
    """Reports on stderr how many plans are done, at most every ``_REPORT_EVERY_S`` seconds."""

    num_plans: int
    began_at: float
    reported_at: float = 0.0

    def __call__(self, num_done: int) -> None:
        now = time.monotonic()
        if now - self.reported_at >= _REPORT_EVERY_S:
            self.reported_at = now
            rate = num_done / (now - self.began_at)
            print(f"{num_done} of {self.num_plans} plans, {rate:.0f} plans/s", file=sys.stderr, flush=True)


def _print_front(losses: PlanLosses) -> None:
    nll = losses.nll
    if losses.dropped_attention is not None:
        return  # plans with drops are compared by time, which the losses do not say
    num_joins = np.bitwise_count(losses.masks)
    print(f"{'joins':>5} {'delta_nll':>10}  best plan")
    for count in range(int(num_joins.max()) + 1):
        rows = np.flatnonzero(num_joins == count)
        best = rows[np.argmin(np.where(np.isfinite(nll[rows]), nll[rows], np.inf))]
        mask = int(losses.masks[best])
        print(f"{count:>5} {nll[best] - nll[0]:>10.4f}  {[i for i in range(mask.bit_length()) if mask >> i & 1]}")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate every plan of a model, and keep the losses as a table.")
    parser.add_argument("--model", required=True, help="alias, hub id, directory or .gguf file")
    parser.add_argument("--data", required=True, help="as for lpsearch optimize, or an .npz windows file")
    parser.add_argument("--windows", type=int, help="number of windows; needed for a text")
    parser.add_argument("--seq-len", type=int, help="tokens in a window; needed for a text")
    parser.add_argument("--by-window", action="store_true", help="keep the loss of every window as well")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--layers", help="layers that may be grouped, e.g. 2-28 (both included; default: all)")
    parser.add_argument("--allow", default="joins", help="what plans may do, as for lpsearch optimize")
    parser.add_argument("--max-joins", type=int, help="leave out plans with more joins")
    parser.add_argument("--max-group", type=int, default=2, help="most layers in a group (default: 2)")
    parser.add_argument("--renumber", action="store_true", help="count layers from the first that may be grouped")
    parser.add_argument("--batch-plans", type=int, help="prefixes in a forward of a layer")
    parser.add_argument("--device", default="auto", help="torch device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    return parser


if __name__ == "__main__":
    sys.exit(main())
