"""``lpsearch generate``: a plan at work on a prompt."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lpsearch.commands.loading import load_model_of_plan, resolve_device, resolve_dtype
from lpsearch.errors import UsageError
from lpsearch.plan import load_plan

if TYPE_CHECKING:
    from lpsearch.models import LoadedModel

__all__ = ["generate"]


def generate(
    plan_path: Path,
    *,
    prompt: str,
    model: str | None,
    max_new_tokens: int,
    compare: bool,
    device: str,
    dtype: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Continue a prompt greedily with a plan applied, streaming the text to stderr.

    Args:
        plan_path: plan file or a directory that holds one.
        prompt: text to continue; a chat prompt is not wrapped in a template.
        model: what to load instead of the model that the plan names.
        max_new_tokens: most tokens to generate.
        compare: also continue with the unmodified model.
        device: torch device, or ``auto``.
        dtype: dtype of the weights, or ``auto``.
        trust_remote_code: run the model's own Python code from the hub.

    Returns:
        ``text``, ``new_tokens`` and ``tokens_per_s`` of the plan, and with ``compare`` the same under ``base``.
    """
    if not prompt:
        raise UsageError("--prompt is empty; give some text to continue")
    plan = load_plan(plan_path)
    target = resolve_device(device)
    loaded = load_model_of_plan(
        plan, model=model, device=target, dtype=resolve_dtype(dtype, target), trust_remote_code=trust_remote_code
    )
    from lpsearch.transform import applied_plan

    result: dict[str, Any] = {"plan": str(plan_path), "depth_reduction": plan.depth_reduction, "prompt": prompt}
    with applied_plan(loaded.model, plan):
        result.update(_continue_prompt(loaded, prompt=prompt, max_new_tokens=max_new_tokens))
    if compare:
        result["base"] = _continue_prompt(loaded, prompt=prompt, max_new_tokens=max_new_tokens)
    return result


def _continue_prompt(loaded: LoadedModel, *, prompt: str, max_new_tokens: int) -> dict[str, Any]:
    """Generate greedily, streaming to stderr; the time counts the prompt's own forward too."""
    import torch
    from transformers import TextStreamer

    class StderrStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sys.stderr.write(text + ("\n" if stream_end else ""))
            sys.stderr.flush()

    tokenizer = loaded.tokenizer
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        output_ids = cast("Any", loaded.model).generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=StderrStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    elapsed_s = time.perf_counter() - started
    new_ids = output_ids[0, inputs["input_ids"].shape[1] :]
    return {
        "text": tokenizer.decode(new_ids, skip_special_tokens=True),
        "new_tokens": len(new_ids),
        "tokens_per_s": round(len(new_ids) / elapsed_s, 2),
    }
