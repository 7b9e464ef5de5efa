"""``lpsearch generate``: generate text with a plan, or with a checkpoint that was exported of one."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lpsearch.commands.console import Answer, get_output
from lpsearch.commands.facts import Facts, Row
from lpsearch.commands.loading import describe_device, load_model_of_plan, resolve_device, resolve_dtype
from lpsearch.commands.options import DeviceOption, DtypeOption, PlanModelOption, TrustOption
from lpsearch.commands.steps import show_steps
from lpsearch.errors import UsageError
from lpsearch.plan import find_recovered_weights, load_plan
from lpsearch.wording import name_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from lpsearch.models import LoadedModel

__all__ = ["generate"]

logger = logging.getLogger(__name__)

_UNFUSED_NOTE = (
    "this shows the plan's text, not its speed: the layers of a group run one after the other here. `lpsearch export` "
    "writes the fused form, and `lpsearch profile` measures what it saves"
)
_FUSED_NOTE = (
    "one run through transformers, which adds much time of its own; `lpsearch profile` measures what a plan saves in a "
    "well-run engine"
)


def generate(
    plan_path: Annotated[
        Path, typer.Argument(help="plan file, or a directory that export or recover wrote", metavar="DIR|PLAN")
    ],
    prompt: Annotated[str, typer.Option(help="text to continue; it is put in no chat template")],
    model: PlanModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate", min=1)] = 64,
    compare: Annotated[bool, typer.Option("--compare", help="also generate with the unmodified model")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> Answer:
    """Continue a prompt with a plan or an exported directory, greedily, and show the text as it comes.

    Of a plan file, the layers of a group still run one after the other, so that its speed is not that of the plan:
    `lpsearch export` writes the fused form, which is what is faster.
    """
    if not prompt:
        raise UsageError("--prompt is empty; give some text to continue")
    plan = load_plan(plan_path)
    target = resolve_device(device)
    chosen_dtype = resolve_dtype(dtype, target)
    result: dict[str, Any] = {"plan": str(plan_path), "depth_reduction": plan.depth_reduction, "prompt": prompt}

    def continue_prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
        answer = _continue_prompt(model, tokenizer, prompt=prompt, max_new_tokens=max_new_tokens)
        if get_output().tables is None:  # else the table says it
            logger.info("%s: %d tokens, %.2f tokens/s", name, answer["new_tokens"], answer["tokens_per_s"])
        return answer

    def check(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        _check_prompt(config, tokenizer, prompt=prompt, max_new_tokens=max_new_tokens)

    def load_base() -> LoadedModel:
        return load_model_of_plan(
            plan,
            model=model,
            device=target,
            dtype=chosen_dtype,
            trust_remote_code=trust_remote_code,
            check=lambda config: _check_room(config, max_new_tokens=max_new_tokens),
            check_tokenizer=check,
        )

    from lpsearch.export import is_exported, load_exported
    from lpsearch.recovery import read_recovery, swapped_weights
    from lpsearch.transform import applied_plan

    if is_exported(plan_path):
        with show_steps(f"loading {plan_path} on {describe_device(target)}"):
            fused, tokenizer = load_exported(plan_path, device=target, dtype=chosen_dtype, before_weights=check)
        result.update(continue_prompt(fused, tokenizer, "fused"))
        del fused
        if compare:
            loaded = load_base()
            result["base"] = continue_prompt(loaded.model, loaded.tokenizer, "base")
        return Answer(result, _describe(result, is_fused=True))
    find_recovered_weights(plan, plan_path)  # which must be there, before anything is loaded
    loaded = load_base()
    weights = read_recovery(loaded.model, plan, plan_path)
    with swapped_weights(loaded.model, weights), applied_plan(loaded.model, plan):
        result.update(continue_prompt(loaded.model, loaded.tokenizer, "plan"))
    if compare:
        result["base"] = continue_prompt(loaded.model, loaded.tokenizer, "base")
    return Answer(result, _describe(result, is_fused=False))


def _describe(result: Mapping[str, Any], *, is_fused: bool) -> Facts:
    """Lay out what was generated, and what its speed says of the plan."""
    base = result.get("base")
    is_shown = not get_output().console.quiet  # as it came
    rows: list[Row] = []
    for name, made in (("fused" if is_fused else "plan", result), ("unmodified", base)):
        if made is not None:
            speed = f"{name_count(made['new_tokens'], 'token')}, {made['tokens_per_s']:.2f} a second"
            rows += [(name, speed), ("", None if is_shown else made["text"])]
    if not is_fused:
        rows.append(("note", _UNFUSED_NOTE))
    elif base is not None:
        rows.append(("note", _FUSED_NOTE))
    return Facts(rows)


def _check_room(config: PretrainedConfig, *, max_new_tokens: int) -> None:
    """Refuse to generate more tokens than a model reads, whatever the prompt.

    Raises:
        UsageError: saying how much fits.
    """
    from lpsearch.models import find_max_positions

    longest = find_max_positions(config)
    if longest is not None and max_new_tokens >= longest:
        raise UsageError(
            f"--max-new-tokens is {max_new_tokens}, but the model reads at most {longest} tokens with the prompt; give "
            f"{longest - 1} or less"
        )


def _check_prompt(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, prompt: str, max_new_tokens: int
) -> None:
    """Refuse a prompt that is nothing to continue, or that leaves too little room for what is to be generated.

    Raises:
        UsageError: saying how much fits.
    """
    from lpsearch.models import find_max_positions

    num_tokens = len(tokenizer(prompt, verbose=False).input_ids)
    if not num_tokens:
        raise UsageError(
            f"--prompt: the tokenizer of this model makes no token of {prompt!r}; give some text to continue"
        )
    longest = find_max_positions(config)
    if longest is None or num_tokens + max_new_tokens <= longest:
        return
    room = longest - num_tokens
    mend = f"give --max-new-tokens {room} or less, or a shorter --prompt" if room > 0 else "give a shorter --prompt"
    raise UsageError(
        f"--prompt has {name_count(num_tokens, 'token')} and --max-new-tokens asks for {max_new_tokens} more, but the "
        f"model reads at most {longest} tokens in all; {mend}"
    )


def _continue_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, prompt: str, max_new_tokens: int
) -> dict[str, Any]:
    """Generate greedily and stream the text to stderr; the time includes the forward of the prompt, but no warm-up."""
    import torch
    from transformers import TextStreamer

    console = get_output().console

    class StderrStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            console.out(text, end="\n" if stream_end else "", highlight=False)

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    options: dict[str, Any] = {
        **inputs,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }
    generate_tokens = cast("Any", model).generate
    with torch.inference_mode():
        generate_tokens(**options, max_new_tokens=1)  # what is set up once must not count
        streamer = StderrStreamer(cast("Any", tokenizer), skip_prompt=True, skip_special_tokens=True)
        started = time.perf_counter()
        output_ids = generate_tokens(**options, max_new_tokens=max_new_tokens, streamer=streamer)
        elapsed_s = time.perf_counter() - started
    new_ids = output_ids[0, inputs["input_ids"].shape[1] :]
    return {
        "text": tokenizer.decode(new_ids, skip_special_tokens=True),
        "new_tokens": len(new_ids),
        "tokens_per_s": round(len(new_ids) / elapsed_s, 2),
    }
