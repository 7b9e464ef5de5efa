"""The directory that ``recover`` writes: what is in it, what it gives back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import lpsearch
from lpsearch.errors import ModelError, PlanError, UsageError
from lpsearch.export import export_checkpoint, export_source, load_exported
from lpsearch.models import fingerprint_model, load_model, resolve_source
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata, RecoveredLoss, Recovery, load_plan, save_plan
from lpsearch.recovery import (
    Refitter,
    apply_recovery,
    load_recovered_weights,
    read_recovery,
    save_recovered,
    swapped_weights,
)
from lpsearch.transform import applied_plan, apply_plan, fuse_plan
from tests.export.byte_tokenizer import write_byte_tokenizer
from tests.fusing import compute_logits, compute_planned_logits, relative_difference
from tests.recovery.refitting import build_windows
from tests.tiny_models import FAMILIES, build_tiny_config, build_tiny_model
from tests.tolerances import BFLOAT16_LOGITS, FLOAT32_FUSED

GROUPS = ((0,), (1, 2), (3,), (4, 5))


def build_plan(model: PreTrainedModel, name: str = "tiny") -> Plan:
    identity = ModelIdentity(id=name, num_layers=6, fingerprint=fingerprint_model(model))
    return Plan.from_groups(GROUPS, metadata=PlanMetadata(model=identity))


def build_recovery(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Recovery:
    with swapped_weights(model, weights):
        fingerprint = fingerprint_model(model)
    loss = RecoveredLoss(
        data="self", windows=4, seq_len=32, num_tokens=124, untouched_delta_nll=0.5, delta_nll=0.2, delta_nll_se=0.01
    )
    return Recovery(
        method="refit", data=("self",), num_tokens=1280, seconds=1.5, settings={"passes": 1}, losses=(loss,),
        fingerprint=fingerprint, dtype="float32", device="cpu", versions={"torch": torch.__version__},
    )  # fmt: skip


def write_refit(
    model: PreTrainedModel, directory: Path, *, plan: Plan | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Refit a model, write the directory and return the weights."""
    plan = plan or build_plan(model)
    weights = dict(Refitter(model, build_windows(seed=seed)).fit(plan).weights)
    save_recovered(directory, plan=plan, model=model, weights=weights, recovery=build_recovery(model, weights))
    return weights


@pytest.fixture
def model() -> PreTrainedModel:
    return build_tiny_model("llama")


def compute_applied_logits(model: PreTrainedModel, plan: Plan) -> Tensor:
    """Logits of a model under a plan; it stays as it is."""
    with applied_plan(model, plan):
        return compute_logits(model)


# ---- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropped", [{}, {"attention": [0, 2], "mlp": [0, 3]}], ids=["joins", "drops"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_gives_back_what_was_saved(family: str, dropped: dict[str, list[int]], tmp_path: Path) -> None:
    model = build_tiny_model(family)
    given = build_plan(model).drop(dropped)
    untouched = compute_applied_logits(model, given)
    weights = write_refit(model, tmp_path / "out", plan=given)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plan.json", "recovered.safetensors"]
    assert fingerprint_model(model) == build_plan(model).metadata.model.fingerprint, "saving changes no model"

    stored = load_file(tmp_path / "out" / "recovered.safetensors")
    assert all(name.startswith("layers.") for name in stored), "whatever the decoder is called"
    assert len(stored) == len(weights)
    for name, weight in weights.items():
        assert torch.equal(stored["layers." + name.split("layers.")[1]], weight)

    again = build_tiny_model(family)
    identities = [id(parameter) for parameter in again.parameters()]
    plan = apply_recovery(again, tmp_path / "out")
    assert [id(parameter) for parameter in again.parameters()] == identities
    assert plan.groups == given.groups
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, weights.get(name, model.get_parameter(name))), name
    repaired = compute_applied_logits(again, plan)
    with swapped_weights(model, weights):
        assert torch.equal(repaired, compute_applied_logits(model, Plan(plan.groups)))
    assert not torch.equal(repaired, untouched)


def test_the_plan_file_says_how_it_was_repaired(model: PreTrainedModel, tmp_path: Path) -> None:
    plan = build_plan(model)
    weights = write_refit(model, tmp_path / "out", plan=plan)
    read = load_plan(tmp_path / "out")
    assert read.metadata.provenance.recovery == build_recovery(model, weights)
    assert read.metadata.provenance.recovery.losses[0].recovered_share == pytest.approx(0.6)
    assert read.without_recovery() == plan
    assert read.metadata.model == plan.metadata.model, "the model that it begins with"
    assert load_plan(tmp_path / "out" / "plan.json") == read


def test_only_what_changed_is_stored(model: PreTrainedModel, tmp_path: Path) -> None:
    weights = write_refit(model, tmp_path / "out")
    num_values = sum(weight.numel() for weight in weights.values())
    outputs, attention_inputs, mlp_inputs = 5 * 32 * (32 + 48), 3 * 32 * (32 + 16 + 16), 4 * 2 * 32 * 48
    assert num_values == outputs + attention_inputs + mlp_inputs, "outputs of five layers, inputs of two groups"
    assert (tmp_path / "out" / "recovered.safetensors").stat().st_size < 4 * num_values + 4096


@pytest.mark.parametrize("loaded_dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("fitted_dtype", [torch.bfloat16, torch.float32])
def test_weights_are_read_in_any_dtype(fitted_dtype: torch.dtype, loaded_dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_tiny_model("llama").to(fitted_dtype)
    weights = write_refit(model, tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "recovered.safetensors").values()} == {fitted_dtype}
    expected = build_tiny_model("llama")
    other = build_tiny_model("llama").to(loaded_dtype)
    read = read_recovery(other, load_plan(tmp_path / "out"), tmp_path / "out")
    assert read.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name].to(loaded_dtype)) for name, tensor in read.items())
    apply_recovery(other, tmp_path / "out")
    with swapped_weights(expected, {name: weight.float() for name, weight in weights.items()}):
        logits = compute_applied_logits(expected, Plan.from_groups(GROUPS))
    apply_plan(other, load_plan(tmp_path / "out"))  # whose fingerprint is that of the repaired model
    assert relative_difference(compute_logits(other), logits) < BFLOAT16_LOGITS


def test_a_plan_that_was_never_repaired_changes_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    save_plan(build_plan(model), tmp_path / "plan.json")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert apply_recovery(model, tmp_path) == build_plan(model)
    assert read_recovery(model, build_plan(model), tmp_path) == {}
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_packages_own_name_is_this_one() -> None:
    assert lpsearch.apply_recovery is apply_recovery


# ---- Fused and exported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox_sequential"])
def test_repaired_weights_are_fused_and_exported(family: str, tmp_path: Path) -> None:
    model = build_tiny_model(family, vocab_size=512)
    model.save_pretrained(tmp_path / "base")
    write_byte_tokenizer(tmp_path / "base")
    weights = write_refit(model, tmp_path / "out")
    plan = apply_recovery(model, tmp_path / "out")
    expected = compute_planned_logits(model, plan)

    export_checkpoint(model, plan, tmp_path / "memory")
    source = resolve_source(str(tmp_path / "base"))
    stored = load_recovered_weights(tmp_path / "out" / "recovered.safetensors")
    assert len(stored) == len(weights)
    export_source(source, plan, tmp_path / "streamed", weights=stored)
    shards = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "streamed")]
    assert shards[0] == shards[1]
    exported, _ = load_exported(tmp_path / "streamed", device="cpu", dtype=torch.float32)
    assert relative_difference(compute_logits(exported), expected) < FLOAT32_FUSED
    card = (tmp_path / "streamed" / "README.md").read_text(encoding="utf-8")
    assert "refitted in closed form" in card
    assert "No weight was retrained" not in card
    assert load_plan(tmp_path / "streamed") == plan

    assert relative_difference(compute_logits(fuse_plan(model, plan)), expected) < FLOAT32_FUSED


def test_a_repaired_plan_is_not_taken_with_unmodified_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "base")
    write_byte_tokenizer(tmp_path / "base")
    write_refit(model, tmp_path / "out")
    plan, source = load_plan(tmp_path / "out"), resolve_source(str(tmp_path / "base"))
    with pytest.raises(PlanError, match=r"belongs to repaired weights.*apply_recovery"):
        apply_plan(model, plan)
    for write in (
        lambda: export_checkpoint(model, plan, tmp_path / "x"),
        lambda: export_source(source, plan, tmp_path / "x"),
    ):
        with pytest.raises(PlanError, match="belongs to repaired weights"):
            write()
    assert not (tmp_path / "x").exists()
    with applied_plan(model, plan.without_recovery()):
        pass


@pytest.mark.parametrize("damage", ["shape", "name", "other"])
def test_export_refuses_weights_that_are_not_the_models(model: PreTrainedModel, tmp_path: Path, damage: str) -> None:
    model.save_pretrained(tmp_path / "base")
    write_byte_tokenizer(tmp_path / "base")
    write_refit(model, tmp_path / "out")
    weights = load_recovered_weights(tmp_path / "out" / "recovered.safetensors")
    name = "layers.1.mlp.down_proj.weight"
    if damage == "shape":
        weights[name] = weights[name][1:]
        message = (
            r"model\.layers\.1\.mlp\.down_proj\.weight: repaired is one of shape \(31, 48\), .* one of shape \(32, 48\)"
        )
    elif damage == "name":
        weights["layers.1.mlp.gone.weight"] = weights.pop(name)
        message = r"model\.layers\.1\.mlp\.gone\.weight: repaired is .* has none"
    else:
        weights[name] = weights[name] + 1
        message = "not those of the plan"
    plan, source = load_plan(tmp_path / "out"), resolve_source(str(tmp_path / "base"))
    with pytest.raises(ModelError, match=message):
        export_source(source, plan, tmp_path / "x", weights=weights)
    assert not (tmp_path / "x").exists()


# ---- Image-text models -----------------------------------------------------------------------------------------------


def test_the_language_model_inside_an_image_text_model_is_repaired(tmp_path: Path) -> None:
    text = build_tiny_config("gemma3_text", vocab_size=512)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    config = CONFIG_MAPPING["gemma3"](
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=1, image_token_index=90
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = AutoModelForImageTextToText.from_config(config).eval()
    inner = build_tiny_model("gemma3_text", vocab_size=512)
    whole.get_decoder().load_state_dict(inner.model.state_dict())
    whole.lm_head.load_state_dict(inner.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "base")
    write_byte_tokenizer(tmp_path / "base")
    source = resolve_source(str(tmp_path / "base"))
    loaded = load_model(source, device="cpu", dtype=torch.float32)
    write_refit(loaded.model, tmp_path / "out")

    plan = apply_recovery(whole, tmp_path / "out")  # whose layers have other names
    apply_recovery(loaded.model, tmp_path / "out")
    expected = compute_planned_logits(loaded.model, plan)
    assert torch.equal(compute_planned_logits(whole, plan), expected)
    stored = load_recovered_weights(tmp_path / "out" / "recovered.safetensors")
    export_source(source, plan, tmp_path / "exported", weights=stored)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert relative_difference(compute_logits(exported), expected) < FLOAT32_FUSED


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_a_plan_without_its_weights_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    write_refit(model, tmp_path / "out")
    (tmp_path / "out" / "plan.json").rename(tmp_path / "plan.json")
    message = r"weights were repaired \(refit\), and there is no recovered\.safetensors beside it; name the directory"
    for path in (tmp_path, tmp_path / "plan.json"):
        with pytest.raises(PlanError, match=message):
            apply_recovery(model, path)
        with pytest.raises(PlanError, match=message):
            read_recovery(model, load_plan(path), path)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "gone"])
def test_damaged_weights_are_refused(model: PreTrainedModel, tmp_path: Path, damage: str) -> None:
    write_refit(model, tmp_path / "out")
    file = tmp_path / "out" / "recovered.safetensors"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
        with pytest.raises(ModelError, match=r"recovered\.safetensors is damaged"):
            load_recovered_weights(file)
        return
    file.write_bytes({"cut": content[:-100], "empty": b"", "noise": b"x" * 1000}[damage])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ModelError, match=r"recovered\.safetensors is damaged: .*; run `lpsearch recover` again"):
        apply_recovery(model, tmp_path / "out")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_weights_of_another_plan_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    write_refit(model, tmp_path / "one")
    write_refit(model, tmp_path / "other", seed=1)
    (tmp_path / "other" / "recovered.safetensors").replace(tmp_path / "one" / "recovered.safetensors")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ModelError, match=r"they are not those of the plan\.json beside them; run `lpsearch recover`"):
        apply_recovery(model, tmp_path / "one")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("change", ["shape", "name", "missing"])
def test_weights_that_do_not_fit_are_refused_by_name(model: PreTrainedModel, tmp_path: Path, change: str) -> None:
    write_refit(model, tmp_path / "out")
    file = tmp_path / "out" / "recovered.safetensors"
    tensors, name = load_file(file), "layers.1.mlp.down_proj.weight"
    if change == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
        message = r"layers\.1\.mlp\.down_proj\.weight has shape \(31, 48\), and the model has one of shape \(32, 48\)"
    elif change == "name":
        tensors["layers.9.mlp.down_proj.weight"] = tensors.pop(name)
        message = r"layers\.9\.mlp\.down_proj\.weight has shape .* the model has none of this name"
    else:
        del tensors[name]
        message = "they are not those of the plan"
    save_file(tensors, file)
    with pytest.raises(ModelError, match=message):
        apply_recovery(model, tmp_path / "out")


def test_other_models_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    write_refit(model, tmp_path / "out")
    for other in (
        build_tiny_model("llama", seed=1),
        build_tiny_model("mistral"),
        build_tiny_model("llama", num_layers=5),
    ):
        with pytest.raises(PlanError, match="the plan is for tiny, but"):
            apply_recovery(other, tmp_path / "out")
    apply_recovery(model, tmp_path / "out")
    with pytest.raises(PlanError, match="the plan is for tiny, but"):  # the model is repaired now
        apply_recovery(model, tmp_path / "out")


def test_a_directory_appears_whole_or_not_at_all(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="is not empty"):
        write_refit(model, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(PlanError, match="without metadata cannot be saved"):
        write_refit(model, tmp_path / "nameless", plan=Plan.from_groups(GROUPS))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lpsearch.recovery.directory.save_plan", fail)  # as a full disk would, after the weights
    with pytest.raises(OSError, match="No space left"):
        write_refit(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_plan_file_of_a_repaired_plan_is_checked_by_the_schema(model: PreTrainedModel, tmp_path: Path) -> None:
    write_refit(model, tmp_path / "out")
    path = tmp_path / "out" / "plan.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["provenance"]["recovery"]["extra"] = 1
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PlanError, match=r"unknown field provenance\.recovery\.extra"):
        apply_recovery(model, tmp_path / "out")
    plan = dataclasses.replace(build_plan(model), metadata=None)
    assert plan.without_recovery() is plan
