"""What tests of refits share: text, errors of hidden states, and a refit of Llama-style layers written out in loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpsearch.data import Windows
from lpsearch.plan import Plan
from lpsearch.recovery import swapped_weights
from lpsearch.transform import applied_plan
from tests.tiny_models import VOCAB_SIZE

__all__ = ["SEARCH_FIT", "SEQ_LEN", "build_windows", "measure_errors", "refit_slowly"]

SEQ_LEN = 32

SEARCH_FIT: dict[str, Any] = {"extent": "grouped", "num_passes": 1, "ridges": (1.0,), "fits_inputs": False}
"""How a search fits: one ridge, in one walk, output projections alone."""


def build_windows(num_windows: int = 40, seed: int = 0, *, num_kinds: int = 1) -> Windows:
    """Build windows of random tokens; each kind of text has its own share of the vocabulary."""
    rng = np.random.default_rng(seed)
    share = (VOCAB_SIZE - 3) // num_kinds
    parts = [
        Windows(rng.integers(3 + n * share, 3 + (n + 1) * share, (num_windows, SEQ_LEN)).astype(np.int32), f"kind {n}")
        for n in range(num_kinds)
    ]
    return Windows.interleave(parts, [1.0] * num_kinds)


def run_and_keep(model: PreTrainedModel, input_ids: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Run a model as it is and return what some of its layers give; under a plan, what their groups give."""
    kept: dict[int, Tensor] = {}
    handles = []
    for layer_idx in layers:
        layer = model.get_decoder().layers[layer_idx]
        handles.append(
            layer.register_forward_hook(
                lambda module, args, output, layer_idx=layer_idx: kept.__setitem__(layer_idx, output)
            )
        )
    with torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return kept


def measure_errors(model: PreTrainedModel, weights: Mapping[str, Tensor], windows: Windows, plan: Plan) -> list[float]:
    """Return the squared error of the hidden states at the end of every group, relative to the unmodified model's."""
    tokens = torch.tensor(windows.input_ids).long()
    ends = [group[-1] for group in plan.groups]
    expected = run_and_keep(model, tokens, ends)
    with swapped_weights(model, weights), applied_plan(model, plan):
        reached = run_and_keep(model, tokens, ends)
    return [
        float(((reached[end] - expected[end]).square().mean(-1) / expected[end].square().mean(-1)).mean())
        for end in ends
    ]


# ---- The slow, obvious refit -----------------------------------------------------------------------------------------


class _Group:
    """Llama-style layers of a double-precision model as one group, with what their output projections read."""

    def __init__(self, model: Any, members: Sequence[int], kwargs_of: dict[int, Any], dropped: dict[str, Any]) -> None:
        self.attentions = [
            (model.model.layers[n], kwargs_of[n]) for n in members if n not in dropped.get("attention", ())
        ]
        self.mlps = [model.model.layers[n] for n in members if n not in dropped.get("mlp", ())]
        self.reads: dict[str, list[Tensor]] = {"attention": [], "mlp": []}

    def run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the group's output, and the stacked inputs of its o_proj and of its down_proj, each (seq, ...).

        A member without an attention or an MLP adds nothing to either. ``reads`` has what each attention and MLP reads.
        """
        attention_inputs, mlp_inputs = [], []
        self.reads = {"attention": [], "mlp": []}
        x1 = x
        for layer, kwargs in self.attentions:
            inputs = keep_inputs(layer.self_attn.o_proj)
            self.reads["attention"].append(layer.input_layernorm(x)[0])
            output = layer.self_attn(layer.input_layernorm(x), **kwargs)[0]
            x1 = x1 + multiplier_of(layer) * output
            attention_inputs.append(with_ones(layer.self_attn.o_proj, multiplier_of(layer), inputs()[0]))
        y = x1
        for layer in self.mlps:
            normed = layer.post_attention_layernorm(x1)
            self.reads["mlp"].append(normed[0])
            inside = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
            y = y + multiplier_of(layer) * layer.mlp.down_proj(inside)
            mlp_inputs.append(with_ones(layer.mlp.down_proj, multiplier_of(layer), inside[0]))
        nothing = torch.zeros(x.shape[1], 0, dtype=torch.float64)
        return y, torch.cat([nothing, *attention_inputs], 1), torch.cat([nothing, *mlp_inputs], 1)


def keep_inputs(module: nn.Module) -> Callable[[], Tensor]:
    """Have a module keep what it reads the next time; what is returned gives it."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def take() -> Tensor:
        handle.remove()
        return seen[0]

    return take


def multiplier_of(layer: Any) -> float:
    return float(getattr(layer, "residual_multiplier", 1.0))


def with_ones(linear: nn.Linear, multiplier: float, inputs: Tensor) -> Tensor:
    """What a change of the projection is multiplied by: its inputs, ones for its bias, both times the multiplier."""
    if linear.bias is not None:
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    return multiplier * inputs


def solve_slowly(inputs: Tensor, residuals: Tensor, counts: Tensor, ridge: float) -> Tensor:
    """Weighted least squares with a ridge, a share of the mean square of an input, by stacked matrices."""
    rows = inputs * counts.sqrt()[:, None]
    penalty = ridge * rows.square().sum(0).mean()
    stacked = torch.cat([rows, penalty.sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)])
    targets = torch.cat([residuals * counts.sqrt()[:, None], torch.zeros(inputs.shape[1], residuals.shape[1])])
    return torch.linalg.lstsq(stacked, targets).solution


@torch.no_grad()
def refit_slowly(
    model: PreTrainedModel,
    plan: Plan,
    windows: Windows,
    *,
    ridges: Sequence[float],
    window_weights: Sequence[float],
    extent: str,
    num_passes: int,
    steps: Sequence[Sequence[int]] | None = None,
) -> tuple[dict[str, Tensor], list[tuple[float | None, float, float]]]:
    """Refit a model of Llama-style layers, window by window in double precision.

    Every fifth window of each kind chooses the ridge. ``steps`` are the layers between one fit and the next, where they
    are not the groups of the plan.

    Returns:
        The new parameters by name, and of every regression the ridge and the error before and after it.
    """
    base, changed = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    entries, outputs, kwargs_of, reads_of = [], [], [], []
    for row in windows.input_ids:
        entry, kwargs, ends, reads = run_base(base, torch.tensor(row).long()[None])
        entries.append(entry)
        reads_of.append(reads)
        kwargs_of.append(kwargs)
        outputs.append(ends)
    chooses_ridge = [index // len(windows.kinds) % 5 == 4 for index in range(windows.num_windows)]

    found = []
    for _ in range(num_passes):
        states = list(entries)
        is_behind = False
        dropped = plan.dropped
        for members in steps or plan.groups:
            is_changed = len(members) > 1 or any(n in members for layers in dropped.values() for n in layers)
            is_behind = is_behind or is_changed
            groups = [_Group(changed, members, kwargs, dropped) for kwargs in kwargs_of]
            stages = ("attention", "mlp") if is_changed or (is_behind and extent == "after") else ()
            for stage in stages:
                running = [n for n in members if n not in dropped[stage]]
                if not running:
                    continue
                for group, state in zip(groups, states, strict=True):
                    group.run(state)
                for place, n in enumerate(running if is_changed else ()):
                    linears = list_readers(changed.model.layers[n], stage)
                    parts: dict[bool, list[tuple[Tensor, Tensor, Tensor]]] = {False: [], True: []}
                    for index, group in enumerate(groups):
                        read, expected = group.reads[stage][place], reads_of[index][stage, n]
                        counts = window_weights[index] / expected.square().mean(-1)
                        inputs = with_ones(linears[0], 1.0, read)
                        parts[chooses_ridge[index]].append((inputs, expected - read, counts))
                    if not any(residual.any() for side in parts.values() for _, residual, _ in side):
                        continue
                    best, change = choose(parts, ridges, found)
                    originals = list_readers(base.model.layers[n], stage)
                    for linear, original in zip(linears, originals, strict=True):
                        mapped = original.weight @ change.T * (best is not None)  # (outputs, inputs)
                        if linear.bias is not None:
                            linear.bias.copy_(original.bias + mapped[:, -1])
                        linear.weight.copy_(original.weight + mapped[:, : linear.in_features])
                parts = {False: [], True: []}
                for index, group in enumerate(groups):
                    y, of_attention, of_mlp = group.run(states[index])
                    target = outputs[index][members[-1]]
                    counts = window_weights[index] / target[0].square().mean(-1)
                    inputs = of_attention if stage == "attention" else of_mlp
                    parts[chooses_ridge[index]].append((inputs, (target - y)[0], counts))
                best, change = choose(parts, ridges, found)
                if best is not None:
                    add(changed, running, stage, change)
            states = [group.run(state)[0] for group, state in zip(groups, states, strict=True)]
    before = dict(base.named_parameters())
    return {name: p for name, p in changed.named_parameters() if not torch.equal(p, before[name])}, found


def choose(
    parts: dict[bool, list[tuple[Tensor, Tensor, Tensor]]], ridges: Sequence[float], found: list[Any]
) -> tuple[float | None, Tensor]:
    """Return the ridge that validates best and the change that all tokens give with it; note errors in ``found``."""
    fitted, validation = ([torch.cat(t) for t in zip(*parts[flag], strict=True)] for flag in (False, True))
    errors: dict[float | None, float] = {None: mean_error(validation, None)}
    for ridge in ridges:
        errors[ridge] = mean_error(validation, solve_slowly(*fitted, ridge))
    best = min(errors, key=lambda ridge: errors[ridge])
    found.append((best, errors[None], errors[best]))
    return best, solve_slowly(*[torch.cat(t) for t in zip(fitted, validation, strict=True)], best or 1.0)


def list_readers(layer: Any, stage: str) -> list[nn.Linear]:
    """List the projections that read what an attention or an MLP reads."""
    if stage == "attention":
        return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    return [layer.mlp.gate_proj, layer.mlp.up_proj]


def run_base(
    base: Any, input_ids: Tensor
) -> tuple[Tensor, dict[int, dict[str, Any]], dict[int, Tensor], dict[tuple[str, int], Tensor]]:
    """Return the first layer's input, every layer's keyword arguments and output, and what its branches read."""
    entry = keep_inputs(base.model.layers[0])
    readers = {
        (stage, n): keep_inputs(list_readers(layer, stage)[0])
        for n, layer in enumerate(base.model.layers)
        for stage in ("attention", "mlp")
    }
    kwargs_of: dict[int, dict[str, Any]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, n=n: kwargs_of.__setitem__(n, kwargs), with_kwargs=True
        )
        for n, layer in enumerate(base.model.layers)
    ]
    ends = run_and_keep(base, input_ids, range(len(handles)))
    for handle in handles:
        handle.remove()
    return entry(), kwargs_of, ends, {key: take()[0] for key, take in readers.items()}


def mean_error(tokens: Sequence[Tensor], change: Tensor | None) -> float:
    inputs, residuals, counts = tokens
    left = residuals if change is None else residuals - inputs @ change
    return float((left.square().mean(-1) * counts).mean())


def add(model: Any, members: Sequence[int], stage: str, change: Tensor) -> None:
    row = 0
    for n in members:
        layer = model.model.layers[n]
        linear = layer.self_attn.o_proj if stage == "attention" else layer.mlp.down_proj
        for column in range(linear.in_features):
            linear.weight[:, column] += change[row]
            row += 1
        if linear.bias is not None:
            linear.bias += change[row]
            row += 1
    assert row == len(change)
