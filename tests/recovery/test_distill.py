"""Distilling a tiny model: against a loop written out, where it stops, and that it goes on where it was killed."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lpsearch.errors import LpsearchError, ModelError, PlanError, ResumeError, UsageError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.latency.ranks.processes import _find_free_port
from lpsearch.plan import Plan
from lpsearch.recovery import memory
from lpsearch.recovery.distill import Distilled, DistillSettings, OnProgress, distill
from lpsearch.transform import apply_plan, undo_plan
from tests.recovery.distilling import PLAN, build_settings, build_training, build_validation
from tests.tiny_models import build_tiny_model
from tests.tolerances import BFLOAT16_ROUNDING, FLOAT32_LOSS, FLOAT32_TRAINED
from tests.warm import WarmProcess, end_all


@pytest.fixture
def model() -> PreTrainedModel:
    return build_tiny_model("llama")


def run(
    model: PreTrainedModel, *, plan: Plan = PLAN, settings: DistillSettings | None = None, **kwargs: Any
) -> Distilled:
    return distill(
        model,
        plan,
        training=build_training(),
        validation=build_validation(),
        settings=settings or build_settings(),
        **kwargs,
    )


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def train_plainly(model: PreTrainedModel, settings: DistillSettings) -> dict[str, Tensor]:
    """Train as :func:`distill` does, written out: whole logits, one batch a step, a schedule in a few lines."""
    base, student = copy.deepcopy(model), apply_plan(copy.deepcopy(model), PLAN)
    trained = {name: p.requires_grad_(True) for name, p in student.named_parameters() if ".layers." in name}
    optimizer = torch.optim.AdamW([{"params": [p]} for p in trained.values()], betas=(0.9, 0.95), weight_decay=0.0)
    # The root mean square of every weight, to a power of the square root of two.
    sizes = [2 ** (round(2 * math.log2(float(p.detach().square().mean() ** 0.5))) / 2) for p in trained.values()]
    training = build_training()
    schedule = training.schedule(12, 8, seed=settings.seed)
    for step in range(12):
        tokens = torch.from_numpy(training.gather(schedule[step]))
        log_probs = student(input_ids=tokens).logits.log_softmax(-1)
        base_log_probs = base(input_ids=tokens).logits.log_softmax(-1)
        (base_log_probs.exp() * (base_log_probs - log_probs)).sum(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        # One step of warm-up (5 % of 12), then a cosine.
        factor = 1.0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 11))
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = settings.learning_rate * size * factor
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in trained.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_equals_a_loop_written_out(model: PreTrainedModel, checkpointing: bool) -> None:
    settings = build_settings(checkpointing=checkpointing)
    distilled = run(model, settings=settings)
    assert distilled.best_step == 12
    expected = train_plainly(model, settings)
    assert largest_difference(dict(distilled.weights), expected) < FLOAT32_TRAINED
    moved = largest_difference(expected, {n: p for n, p in model.named_parameters() if n in expected})
    assert moved > 100 * FLOAT32_TRAINED


def test_compiled_training_equals_the_loop_too_and_leaves_the_model_uncompiled(model: PreTrainedModel) -> None:
    settings = build_settings(compile=True, micro_batch=4)  # one shape, or all would be compiled twice
    distilled = run(model, settings=settings)
    assert largest_difference(dict(distilled.weights), train_plainly(model, settings)) < FLOAT32_TRAINED
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_losses_are_those_of_the_evaluator_and_the_model_is_left_alone(model: PreTrainedModel) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    distilled = run(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (distilled.steps, distilled.tokens, distilled.stopped) == (12, 12 * 8 * 16, "end")
    assert [evaluation.step for evaluation in distilled.history] == [0, 4, 8, 12]

    for kind, windows in build_validation().items():
        evaluator = ModelEvaluator(model=model, windows=windows, metric="kl")
        for weights, expected in ((before, distilled.untouched), (distilled.weights, distilled.history[-1].validation)):
            losses = evaluator.evaluate_windows(PLAN, range(windows.num_windows))
            if weights is not before:
                with torch.no_grad():
                    for name, weight in weights.items():
                        model.get_parameter(name).copy_(weight)
                losses = evaluator.evaluate_windows(PLAN, range(windows.num_windows), variant="distilled")
            assert losses.kl_nats_per_token is not None
            assert abs(sum(losses.kl_nats_per_token) / windows.num_windows - expected[kind].kl) < FLOAT32_LOSS
            assert abs(sum(losses.nll_nats_per_token) / windows.num_windows - expected[kind].nll) < FLOAT32_LOSS
        model.load_state_dict(before, strict=False)
    first, last = (
        sum(loss.kl for loss in e.validation.values()) for e in (distilled.history[0], distilled.history[-1])
    )
    assert last < first
    assert distilled.recovered == pytest.approx(1 - last / first)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "phi", "mixtral"])
def test_every_kind_of_layer_recovers(family: str) -> None:
    distilled = run(build_tiny_model(family), settings=build_settings(num_tokens=40 * 8 * 16))
    assert distilled.recovered > 0.1


def test_only_the_grouped_layers_are_trained(model: PreTrainedModel) -> None:
    distilled = run(model, settings=build_settings(train="grouped"))
    layers = {int(name.split(".")[2]) for name in distilled.weights}
    assert layers == {1, 2, 3, 4}
    assert distilled.num_trained == sum(weight.numel() for weight in distilled.weights.values())
    assert distilled.recovered > 0


def test_adapters_are_merged_into_what_is_returned(model: PreTrainedModel) -> None:
    begun = {name: p + 0.01 for name, p in model.named_parameters() if "layers.1.mlp.down_proj" in name}
    distilled = run(model, settings=build_settings(lora_rank=2), weights=begun)
    linears = {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    assert distilled.weights.keys() == linears
    assert distilled.num_trained < sum(weight.numel() for weight in distilled.weights.values())
    for name, weight in distilled.weights.items():
        change = weight - begun.get(name, model.get_parameter(name))
        assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2, name
    validation = build_validation()
    apply_plan(model, PLAN).load_state_dict(dict(distilled.weights), strict=False)
    best = next(e for e in distilled.history if e.step == distilled.best_step)
    for kind, windows in validation.items():
        tokens = torch.tensor(windows.input_ids).long()
        logits = model(input_ids=tokens).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert abs(float(nll) - best.validation[kind].nll) < FLOAT32_LOSS


def test_training_begins_with_the_weights_it_is_given(model: PreTrainedModel) -> None:
    first = run(model)
    again = run(model, settings=build_settings(num_tokens=4 * 8 * 16), weights=first.weights)
    assert again.untouched == first.untouched
    for kind, loss in again.history[0].validation.items():
        assert abs(loss.kl - first.history[-1].validation[kind].kl) < FLOAT32_LOSS
    assert again.recovered >= first.recovered - 1e-6
    with pytest.raises(ModelError, match=r"a weight to begin with is lm_head\.weight"):
        run(model, weights={"lm_head.weight": torch.zeros(97, 32)})
    with pytest.raises(ModelError, match=r"of shape \(3,\), and the model has one of shape \(32, 32\)"):
        run(model, weights={"model.layers.0.self_attn.q_proj.weight": torch.zeros(3)})


def test_the_result_is_never_worse_than_where_it_began(model: PreTrainedModel) -> None:
    begun = run(model).weights
    worse = run(model, settings=build_settings(learning_rate=1.0, patience=2), weights=begun)
    assert (worse.best_step, worse.stopped, worse.steps) == (0, "early", 8)
    assert worse.weights.keys() == begun.keys()
    assert all(torch.equal(worse.weights[name], begun[name]) for name in begun)


def test_weights_are_returned_in_the_dtype_of_the_model() -> None:
    model = build_tiny_model("llama").to(torch.bfloat16)
    distilled = run(model)
    assert {weight.dtype for weight in distilled.weights.values()} == {torch.bfloat16}
    expected = run(model.float())
    assert largest_difference(dict(distilled.weights), dict(expected.weights)) < BFLOAT16_ROUNDING


def test_a_loss_that_is_not_finite_stops_training_with_the_best_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    settings = build_settings(
        num_tokens=200 * 8 * 16, evaluate_every=2, learning_rate=1e20, warmup_share=1.0, patience=None
    )
    # The rate rises from 5e17 at the first step: weights overflow within a few.
    distilled = run(model, settings=settings, checkpoint_dir=tmp_path)
    assert distilled.stopped == "nan"
    assert all(math.isfinite(evaluation.mean_kl) for evaluation in distilled.history)
    assert all(weight.isfinite().all() for weight in distilled.weights.values())
    for path in tmp_path.glob("*/state.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a training from within, as a kill would: nothing handles it."""


def kill_at(killed_at: int) -> OnProgress:
    def kill(step: int, steps: int, loss: float, recovered: float) -> None:
        if step == killed_at:
            raise Killed

    return kill


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_killed_training_goes_on_with_the_same_bits(
    model: PreTrainedModel, tmp_path: Path, lora_rank: int | None
) -> None:
    settings = build_settings(lora_rank=lora_rank)
    begun = {name: p * 1.01 for name, p in model.named_parameters() if "layers.2.self_attn.o_proj" in name}
    whole = run(model, settings=settings, weights=begun)

    for killed_at in (4, 10):  # at a checkpoint, and between two
        with pytest.raises(Killed):
            run(model, settings=settings, weights=begun, checkpoint_dir=tmp_path, on_progress=kill_at(killed_at))
    reached: list[int] = []
    resumed = run(
        model,
        settings=settings,
        weights=begun,
        checkpoint_dir=tmp_path,
        on_progress=lambda step, *_: reached.append(step),
    )
    assert reached == [10, 12]
    assert largest_difference(dict(resumed.weights), dict(whole.weights)) == 0
    assert resumed.history == whole.history
    finished = run(model, settings=settings, weights=begun, checkpoint_dir=tmp_path, on_progress=kill_at(12))
    assert largest_difference(dict(finished.weights), dict(whole.weights)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012"]


def test_a_checkpoint_of_another_training_is_refused_by_name(model: PreTrainedModel, tmp_path: Path) -> None:
    short = build_settings(num_tokens=4 * 8 * 16)
    run(model, settings=short, checkpoint_dir=tmp_path)
    changed = dataclasses.replace(short, learning_rate=1e-5)
    with pytest.raises(ResumeError, match=r"settings\.learning_rate 0\.003 there and 1e-05 now; give the same"):
        run(model, settings=changed, checkpoint_dir=tmp_path)
    with pytest.raises(ResumeError, match=r"another training: plan '\[\[0\],\[1,2\],\[3,4\],\[5\]\]' there"):
        run(model, plan=Plan.from_joins(6, [0]), settings=short, checkpoint_dir=tmp_path)
    with pytest.raises(ResumeError, match="another training: model"):
        run(build_tiny_model("llama", seed=1), settings=short, checkpoint_dir=tmp_path)
    begun = {"model.layers.0.mlp.down_proj.weight": torch.zeros(32, 48)}
    with pytest.raises(ResumeError, match="another training: weights"):
        run(model, settings=short, checkpoint_dir=tmp_path, weights=begun)
    (tmp_path / "step-00000004" / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(ResumeError, match=r"step-00000004: the checkpoint cannot be read \(.*; delete the directory"):
        run(model, settings=short, checkpoint_dir=tmp_path)


def test_an_unfinished_checkpoint_is_passed_over(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "step-00000008.unfinished").mkdir()
    distilled = run(model, settings=build_settings(num_tokens=4 * 8 * 16), checkpoint_dir=tmp_path)
    assert distilled.steps == 4
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_a_plan_without_groups_and_a_planned_model_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(PlanError, match="nothing to recover"):
        run(model, plan=Plan.baseline(6))
    apply_plan(model, PLAN)
    with pytest.raises(ModelError, match="a plan is applied"):
        run(model)
    undo_plan(model)
    layer = model.model.layers[2].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj\.weight is quantised \(torch\.int8\)"):
        run(model)


def test_adapters_without_peft_name_the_extra(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(UsageError, match=r"--lora needs PEFT; install it with: pip install 'lpsearch\[recover\]'"):
        run(model, settings=build_settings(lora_rank=2))


@pytest.mark.parametrize(
    "changes",
    [{"num_tokens": 0}, {"micro_batch": 0}, {"learning_rate": math.nan}, {"warmup_share": 2.0}, {"train": "x"}],
)
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        build_settings(**changes)


def test_training_that_cannot_fit_is_refused_with_what_would(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_all = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    free = memory.estimate_state_bytes(num_all) - 1
    monkeypatch.setattr(memory, "find_free_bytes", lambda device: free)
    with pytest.raises(LpsearchError, match=r"before any batch; --train grouped takes .*, --lora 16 takes little"):
        run(model)
    run(model, settings=build_settings(num_tokens=1, train="grouped"))
    message = memory.describe_exhaustion(
        torch.device("cuda", 0), "out of memory", micro_batch=4, seq_len=16, options={"grouped"}
    )
    assert "try --micro-batch 2, --checkpointing, --lora 16" in message


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("lora_rank", "compiles"), [(None, False), (2, False), (None, True), (2, True)])
def test_training_on_a_gpu_is_in_bfloat16_with_float32_masters(
    model: PreTrainedModel, tmp_path: Path, dtype: torch.dtype, lora_rank: int | None, compiles: bool
) -> None:
    settings = build_settings(num_tokens=40 * 8 * 16, micro_batch=None, lora_rank=lora_rank, compile=compiles)
    on_gpu = build_tiny_model("llama").to("cuda", dtype)
    distilled = run(on_gpu, settings=settings, checkpoint_dir=tmp_path)
    expected = run(model, settings=dataclasses.replace(settings, micro_batch=8, compile=False))
    assert {(weight.dtype, weight.device.type) for weight in distilled.weights.values()} == {(dtype, "cpu")}
    assert distilled.recovered > 0.5 * expected.recovered > 0.05
    state = load_file(next(tmp_path.glob("*/state.safetensors")))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


# ---- Several processes -----------------------------------------------------------------------------------------------

_PROCESS = """
import sys
from safetensors.torch import save_file
import torch.distributed
from tests.recovery.test_distill import build_settings, run
from tests.tiny_models import build_tiny_model

torch.set_num_threads(1)
distilled = run(build_tiny_model("llama"), settings=build_settings(micro_batch=3))
if torch.distributed.get_rank() == 0:
    print([evaluation.mean_kl for evaluation in distilled.history])
    save_file(dict(distilled.weights), sys.argv[1])
else:
    assert not distilled.weights
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_as_one_does(model: PreTrainedModel, tmp_path: Path) -> None:
    result = tmp_path / "weights.safetensors"
    together = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_find_free_port()), WORLD_SIZE="2")
    together |= {"TORCHELASTIC_RUN_ID": "test"}  # as torchrun starts them, which the command's own test does
    ranks = [
        WarmProcess(result, code=_PROCESS, env={**together, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]
    (stdout, _), _ = end_all(ranks, timeout=120)
    expected = run(model)
    assert largest_difference(load_file(result), dict(expected.weights)) < FLOAT32_TRAINED
    losses = json.loads(stdout.splitlines()[-1])
    for loss, evaluation in zip(losses, expected.history, strict=True):
        assert abs(loss - evaluation.mean_kl) < FLOAT32_LOSS
