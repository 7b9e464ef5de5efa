"""The model card of an exported directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpsearch.models.aliases import describe_weights, find_base, find_title, name_model
from lpsearch.plan import KindMetrics, ModelIdentity, Plan, ProxyMetrics
from lpsearch.versions import __version__

__all__ = ["write_card"]

_LOAD = """\
## How to load

In transformers, without lpsearch:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, trust_remote_code=True)
```

In vLLM, through its Transformers backend:

```
vllm serve DIRECTORY --trust-remote-code
```

or, with `pip install lpsearch[vllm]`, natively and without `--trust-remote-code`. The modelling code is
`modeling_lpsearch.py` in this directory; it subclasses the base model's own classes in transformers.
"""


def write_card(path: Path, *, plan: Plan, config: Any, licence: str | None, notices: Sequence[Path]) -> None:
    """Write the card: what was done, what was measured, how to load it, and the base model's licence.

    Args:
        path: the file to write.
        plan: with metadata.
        config: of the fused model.
        licence: identifier of the base model's licence; None if it is not known.
        notices: licence and notice files that stand beside the card.
    """
    assert plan.metadata is not None  # only such a plan can be written beside it
    identity = plan.metadata.model
    is_local = Path(identity.id).is_absolute()
    base = Path(identity.id).name if is_local else name_model(identity.id)
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [lpsearch]"]
    base_id = find_base(identity.id)
    if not is_local and "/" in (base_id or identity.id):
        header.append(f"base_model: {base_id or identity.id}")
    if licence is not None:
        header.append(f"license: {licence}")
    elif notices:
        header += ["license: other", f"license_link: {notices[0].name}"]
    joined = [group for group in plan.groups if len(group) > 1]
    content = json.dumps(json.loads(plan.key))
    parts = [
        "\n".join(["---", *header, "---"]),
        f"# {base}, {plan.num_layers} layers as {plan.depth:g}",
        f"The decoder layers of {base}{_describe_artefact(identity)} were grouped by "
        f"lpsearch {__version__}: its {plan.num_layers} layers run as {len(plan.groups)} groups, one after another "
        f"({plan.depth_reduction:.1%} less depth). The layers of a group read the same hidden states and their outputs "
        f"are summed, so that a group is one wide layer. {_describe_recovery(plan)} Weights were joined, and what "
        "the norms of a group do not share was folded into them in float32; the result is stored in "
        f"{str(config.dtype).removeprefix('torch.')}.",
        f"Layers together: {', '.join(f'{group[0]} to {group[-1]}' for group in joined) or 'none'}.",
        *_describe_dropped(plan),
        *_describe_metrics(plan),
        *filter(None, [describe_weights(identity.id)]),
        _LOAD.rstrip(),
        "## Licence\n\n" + _describe_licence(licence, notices),
        f"The plan is `plan.json` in this directory:\n\n```json\n{content}\n```",
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _describe_artefact(identity: ModelIdentity) -> str:
    """Say which artefact the base model is, as far as its name does not."""
    package = f"package {identity.id}" if find_title(identity.id) else None
    words = " ".join(filter(None, [package, identity.revision]))
    return f" ({words})" if words else ""


def _describe_dropped(plan: Plan) -> list[str]:
    """Say which branches the checkpoint lacks; nothing of a plan that drops none."""
    words = {"attention": "the attention", "mlp": "the MLP"}
    left_out = [
        f"{words[branch]} of {'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"
        for branch, layers in plan.dropped.items()
        if layers
    ]
    return [f"Left out, and not stored: {' and '.join(left_out)}."] if left_out else []


def _describe_recovery(plan: Plan) -> str:
    """Say whether the weights are the base model's own."""
    assert plan.metadata is not None
    recovery = plan.metadata.provenance.recovery
    if recovery is None:
        return "No weight was retrained."
    how = "refitted in closed form" if recovery.method == "refit" else f"distilled in {recovery.steps} steps"
    losses = "; ".join(
        f"{loss.data}: {loss.delta_nll:+.4f} nats/token against the base model, {loss.untouched_delta_nll:+.4f} before"
        for loss in recovery.losses
    )
    text = f" on {', '.join(recovery.data)}"
    return f"Weights were {how}{text}{f' ({losses}). What was measured below is from before' if losses else ''}."


def _describe_metrics(plan: Plan) -> list[str]:
    """Say what was measured of the plan."""
    assert plan.metadata is not None
    metrics = plan.metadata.metrics
    rows = [
        row
        for name, loss in (("searched on", metrics.proxy), ("held out", metrics.heldout))
        if loss is not None
        for row in _describe_loss(name, loss)
    ]
    parts = ["## Measured"]
    if rows:
        columns = "| windows | data | NLL, nats/token | against the base model | perplexity |"
        parts.append("\n".join([columns, "|---|---|---|---|---|", *rows]))
    if (latency := metrics.latency) is not None:
        parts.append(
            f"One decode step of {latency.batch_size} sequences with {latency.context_len} cached tokens: "
            f"{latency.latency_ms:.3f} ms {latency.kind} against {latency.baseline_latency_ms:.3f} ms "
            f"({latency.speedup:.3f}x) on {latency.device}, {latency.dtype}, "
            f"engine {latency.engine or 'runtime'}: {latency.runtime}."
        )
    return [*parts, "Nothing; the plan was made by hand."] if len(parts) == 1 else parts


def _describe_loss(name: str, loss: ProxyMetrics) -> list[str]:
    """Return a row, and one for each of several kinds of text."""
    rows = []
    parts: list[ProxyMetrics | KindMetrics] = [loss, *loss.by_kind]
    for part in parts:
        error = "" if part.delta_nll_se is None else f" ± {part.delta_nll_se:.4f}"
        size = f"{name}: {part.windows} of {loss.seq_len} tokens, {loss.dtype}"
        rows.append(f"| {size} | {part.data} | {part.nll:.4f} | {part.delta_nll:+.4f}{error} | {part.perplexity:.2f} |")
    return rows


def _describe_licence(licence: str | None, notices: Sequence[Path]) -> str:
    """Say under which terms the weights are."""
    kept = f" Its notices are kept here: {', '.join(notice.name for notice in notices)}." if notices else ""
    if licence is None and not notices:
        return "That of the base model, which its files did not name."
    return f"That of the base model{f', {licence}' if licence else ''}.{kept}"
