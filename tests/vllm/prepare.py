"""Write the directories that the tests of this package serve, and what transformers makes of each.

    python -m tests.vllm.prepare DIRECTORY

It runs in lpsearch's ordinary environment. Beside every exported directory stands ``NAME.json``: the prompts, and the
greedy continuations and the log probabilities of the first new token by the base model *under the plan, not fused*.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lpsearch import Plan, applied_plan, export_checkpoint
from lpsearch.models import load_model, resolve_source
from lpsearch.plan import PlanMetadata, save_plan
from tests.fusing import silence_dropped
from tests.tiny_models import FUSED_FAMILIES, VOCAB_SIZE, build_tiny_model

SMOLLM2_PLANS = {
    # Single layers, pairs, a group of three and one of four: 3, 6, 9 and 12 key-value heads.
    "smollm2-mixed": [[0], [1], [2], [3], [4, 5], [6], [7, 8], [9], [10, 11], [12, 13, 14], [15], [16, 17, 18, 19]]
    + [[layer] for layer in range(20, 30)],
    # Even groups alone: two ranks cannot share the 9 heads of a single layer equally.
    "smollm2-even": [[0, 1], [2, 3], [4, 5], [6, 7, 8, 9], *([layer, layer + 1] for layer in range(10, 30, 2))],
}
SMOLLM2_PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "The three most important things about writing are",
    "In 1969, people first",
    "A group of layers can run in parallel because",
    "Dear Sir or Madam,\n\n",
]
SMOLLM2_NEW_TOKENS = 16

TINY_PLAN = [[0], [1, 2], [3, 4, 5]]
# An MLP ahead of the first attention, one after another group's, a group with one MLP fewer, one without any, a single
# layer without. Where layers attend in several ways, the groups are of two slots.
DROPPING_GROUPS = [[0], [1, 2], [3], [4, 5], [6], [7]]
DROPPED = {"attention": [0, 3], "mlp": [2, 4, 5, 7]}
TINY_PROMPTS = [[3 + (7 * i * j + 5 * j) % (VOCAB_SIZE - 3) for j in range(11 + 3 * i)] for i in range(4)]
TINY_NEW_TOKENS = 8
TINY_SHAPE: dict[str, Any] = {  # vLLM's attention for CPUs takes heads of 32 and more
    "hidden_size": 128,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "head_dim": 32,
}
DROPPING = "-dropping"
"""What follows a family's name in that of the directory whose plan drops branches."""

RECOVERED = "llama-recovered"


def main(root: Path) -> None:
    """Write everything under a directory, from scratch."""
    if root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True)
    torch.manual_seed(0)
    for family in FUSED_FAMILIES:
        model = build_tiny_model(family, **TINY_SHAPE)
        plan = Plan.from_groups(TINY_PLAN)
        export_checkpoint(model, plan, root / family)
        _write_expected(root, family, model, plan, TINY_PROMPTS, TINY_NEW_TOKENS)
        model, name = build_tiny_model(family, num_layers=8, **TINY_SHAPE), f"{family}{DROPPING}"
        plan = Plan.from_groups(DROPPING_GROUPS, dropped=DROPPED)
        export_checkpoint(model, plan, root / name)
        _write_expected(root, name, model, silence_dropped(model, plan), TINY_PROMPTS, TINY_NEW_TOKENS)
    _write_recovered(root, RECOVERED, Plan.from_groups(TINY_PLAN))
    dropping = Plan.from_groups([[0], [1, 2], [3], [4, 5]], dropped={"attention": [0, 3], "mlp": [2, 5]})
    _write_recovered(root, f"{RECOVERED}{DROPPING}", dropping)
    loaded = load_model(resolve_source("smollm2-135m"), device="cpu", dtype=torch.float32)
    prompts = [loaded.tokenizer(prompt)["input_ids"] for prompt in SMOLLM2_PROMPTS]
    loaded.model.generation_config.eos_token_id = None
    for name, groups in SMOLLM2_PLANS.items():
        plan = Plan.from_groups(groups)
        export_checkpoint(loaded.model, plan, root / name, tokenizer=loaded.tokenizer)
        _write_expected(root, name, loaded.model, plan, prompts, SMOLLM2_NEW_TOKENS)


def _write_recovered(root: Path, name: str, plan: Plan) -> None:
    """Recover a plan of a tiny model by the command, and export the directory by the command."""
    from lpsearch.recovery import apply_recovery  # which the tests' own environment has, and vLLM's need not
    from tests.export.byte_tokenizer import write_character_tokenizer

    base, recovered, plan_file = (root / "recovered" / name / part for part in ("base", "repaired", "plan.json"))
    model = build_tiny_model("llama", vocab_size=512, **TINY_SHAPE)
    model.save_pretrained(base)
    write_character_tokenizer(base)
    loaded = load_model(resolve_source(str(base)), device="cpu", dtype=torch.float32)
    save_plan(Plan(plan.groups, PlanMetadata(model=loaded.identity)), plan_file)
    recover = ["recover", plan_file, "--method", "refit", "--out", recovered, "--data", "self"]
    recover += ["--windows", 200, "--seq-len", 32, "--device", "cpu", "--dtype", "float32"]
    for arguments in (recover, ["export", recovered, root / name]):
        subprocess.run([sys.executable, "-m", "lpsearch", *map(str, arguments)], check=True)
    model = loaded.model
    model.generation_config.eos_token_id = None
    untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    repaired = apply_recovery(model, recovered)
    assert any(not torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())
    _write_expected(root, name, model, silence_dropped(model, repaired), TINY_PROMPTS, TINY_NEW_TOKENS)


@torch.no_grad()
def _write_expected(
    root: Path, name: str, model: PreTrainedModel, plan: Plan, prompts: Sequence[list[int]], num_new_tokens: int
) -> None:
    """Write what the base model under the plan says to each prompt."""
    with applied_plan(model, plan):
        inputs = [torch.tensor([prompt]) for prompt in prompts]
        options = {"max_new_tokens": num_new_tokens, "do_sample": False, "pad_token_id": 0}
        greedy = [model.generate(ids, **options)[0, ids.shape[1] :].tolist() for ids in inputs]
        log_probs = [model(ids).logits[0, -1].double().log_softmax(-1).tolist() for ids in inputs]
    expected = {"prompts": list(prompts), "greedy": greedy, "log_probs": log_probs}
    (root / f"{name}.json").write_text(json.dumps(expected), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
