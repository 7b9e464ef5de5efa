"""Refits of tiny models: against one written out in loops, what they lower, and what they refuse."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from lpsearch.data import Windows
from lpsearch.errors import DataError, LpsearchError, ModelError, PlanError
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata
from lpsearch.recovery import Refit, Refitter, swapped_weights
from lpsearch.recovery.refit import RIDGES
from lpsearch.transform import apply_plan, undo_plan
from tests.recovery.refitting import build_windows, measure_errors, refit_slowly
from tests.tiny_models import FAMILIES, build_tiny_model
from tests.tolerances import FLOAT32_REFIT

PLAN = Plan.from_groups([[0], [1, 2], [3], [4, 5]])
EXPERTS = ("mixtral", "qwen3_moe")
POST_NORM = ("gemma2", "gemma3_text", "olmo2", "olmo3", "glm4")


@pytest.fixture
def model() -> PreTrainedModel:
    return build_tiny_model("llama")


def refit(model: PreTrainedModel, plan: Plan = PLAN, windows: Windows | None = None, **options: Any) -> Refit:
    return Refitter(model, windows or build_windows(), **options).fit(plan)


# ---- Against loops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("granite", {}),
        ("qwen3", {}),
    ],
)
@pytest.mark.parametrize(("extent", "num_passes"), [("grouped", 1), ("after", 2)])
def test_a_refit_is_what_loops_compute(family: str, options: dict[str, Any], extent: Any, num_passes: int) -> None:
    plan = Plan.from_groups([[0], [1, 2], [3]])
    model = build_tiny_model(family, num_layers=4, **options)
    windows = build_windows(40 if extent == "after" else 15, num_kinds=2)
    window_weights = [1.0 + index % 2 for index in range(windows.num_windows)]
    arguments: dict[str, Any] = {"extent": extent, "num_passes": num_passes, "window_weights": window_weights}
    found = refit(model, plan, windows, batch_size=4, **arguments)
    weights, products = refit_slowly(model, plan, windows, ridges=RIDGES, **arguments)
    assert found.weights.keys() == weights.keys()
    assert {name.split(".")[2] for name in weights} == ({"1", "2"} if extent == "grouped" else {"1", "2", "3"})
    assert any(name.endswith("bias") for name in weights) == bool(options)
    for product, (ridge, before, after) in zip(found.products, products, strict=True):
        assert product.ridge == ridge
        assert product.error_before == pytest.approx(before, rel=FLOAT32_REFIT)
        assert product.error_after == pytest.approx(after, rel=FLOAT32_REFIT)
    for name, weight in found.weights.items():
        change, expected = (w.double() - model.get_parameter(name).double() for w in (weight, weights[name]))
        assert float((change - expected).norm() / expected.norm()) < FLOAT32_REFIT, name


@pytest.mark.parametrize(("extent", "num_passes"), [("grouped", 1), ("after", 2)])
def test_a_refit_of_what_is_left_of_dropped_groups_is_what_loops_compute(extent: Any, num_passes: int) -> None:
    """One layer of which nothing is left, behind a whole one that takes up its error; a pair with one branch less."""
    plan = Plan.from_groups([[0], [1], [2], [3, 4], [5]], dropped={"attention": [2, 4, 5], "mlp": [2]})
    model = build_tiny_model("llama", mlp_bias=True)
    windows = build_windows(40, num_kinds=2)
    arguments: dict[str, Any] = {"extent": extent, "num_passes": num_passes, "window_weights": [1.0] * 80}
    found = refit(model, plan, windows, batch_size=4, **arguments)
    steps = [[0], [1, 2], [3, 4], [5]]
    weights, products = refit_slowly(model, plan, windows, ridges=RIDGES, steps=steps, **arguments)
    expected_layers = [(1,), (1,), (1,), (3,), (3,), (3,), (4,), (3, 4), (5,), (5,)]
    assert [product.layers for product in found.products] == expected_layers * num_passes
    assert found.weights.keys() == weights.keys()
    assert not any("layers.2." in name or "layers.5.self_attn" in name for name in weights)
    for product, (ridge, before, after) in zip(found.products, products, strict=True):
        assert product.ridge == ridge
        assert product.error_before == pytest.approx(before, rel=FLOAT32_REFIT)
        assert product.error_after == pytest.approx(after, rel=FLOAT32_REFIT)
    for name, weight in found.weights.items():
        change, expected = (w.double() - model.get_parameter(name).double() for w in (weight, weights[name]))
        assert float((change - expected).norm() / expected.norm()) < FLOAT32_REFIT, name


# ---- What it lowers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_lowers_the_error_on_text_that_it_did_not_see(family: str) -> None:
    model = build_tiny_model(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    found = refit(model)

    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), "bit for bit"
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    parameters = dict(model.named_parameters())
    for name, weight in found.weights.items():
        assert (weight.shape, weight.dtype) == (parameters[name].shape, parameters[name].dtype)
        assert not weight.is_inference(), "so that it can be trained"
        assert not torch.equal(weight, parameters[name])

    unseen = build_windows(16, seed=1)
    before, after = measure_errors(model, {}, unseen, PLAN), measure_errors(model, found.weights, unseen, PLAN)
    assert before[0] == after[0] == 0, "nothing is fitted before the first group"
    assert all(repaired < 0.85 * untouched for repaired, untouched in zip(after[1:], before[1:], strict=True))
    assert {product.ridge is not None for product in found.products[:2]} == {True}
    for product in found.products:
        assert (product.error_after < product.error_before) == (product.ridge is not None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extent", ["grouped", "after"])
def test_a_refit_takes_up_what_dropped_branches_did(family: str, extent: Any) -> None:
    model = build_tiny_model(family)
    plan = Plan.from_groups([[0], [1], [2], [3, 4], [5]], dropped={"attention": [1, 4], "mlp": [2, 5]})
    found = refit(model, plan, build_windows(60), extent=extent)
    for product in found.products:
        assert product.layers in {(1,), (2,), (3,), (4,), (3, 4), (5,)}
        assert not set(product.layers) & set(plan.dropped["mlp" if "mlp" in product.module else "attention"])
        assert product.error_after < product.error_before or product.ridge is None
    unseen = build_windows(16, seed=1)
    before, after = measure_errors(model, {}, unseen, plan), measure_errors(model, found.weights, unseen, plan)
    assert after[0] == 0
    assert after[-1] < 0.9 * before[-1]


@pytest.mark.parametrize("dropped", [[0], [0, 1], [5], [2, 3]])
def test_the_error_of_a_layer_of_which_nothing_is_left_is_taken_up_beside_it(dropped: list[int]) -> None:
    """By the layer before it; where there is none, by the layer behind it."""
    model = build_tiny_model("llama")
    plan = Plan.baseline(6).drop({"attention": dropped, "mlp": dropped})
    found = refit(model, plan, extent="grouped")
    neighbour = dropped[-1] + 1 if dropped[0] == 0 else dropped[0] - 1
    assert {product.layers for product in found.products} == {(neighbour,)}
    end = max(neighbour, dropped[-1])
    unseen = build_windows(16, seed=1)
    before, after = (measure_errors(model, weights, unseen, plan)[end] for weights in ({}, found.weights))
    assert after < 0.95 * before


def test_a_model_without_any_branch_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(PlanError, match="drops every branch of the model, so there is nothing to refit"):
        refit(model, Plan.from_groups([[0, 1], [2, 3], [4, 5]], dropped={"attention": range(6), "mlp": range(6)}))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_projections_of_the_extent_change(family: str) -> None:
    """Behind the groups only what a layer adds is fitted, and not what it reads."""
    model = build_tiny_model(family)
    outputs = {"o_proj", "dense", "down_proj", "c_proj", "fc2", "dense_4h_to_h"}
    inputs = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"}
    inputs |= {"gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h"}
    for extent, layers in (("grouped", {1, 2, 4, 5}), ("after", {1, 2, 3, 4, 5})):
        found = refit(model, extent=extent)
        assert {int(name.split("layers.")[1].split(".")[0]) for name in found.weights} <= layers
        assert {layer for product in found.products for layer in product.layers} == layers
        changed = {(int(name.split("layers.")[1].split(".")[0]), name.split(".")[-2]) for name in found.weights}
        assert {name for _, name in changed} <= inputs | outputs
        assert {layer for layer, name in changed if name in inputs} <= {1, 2, 4, 5}
        assert {layer for layer, name in changed if name in inputs} >= {2, 5}, "each reads other than it did"
        without = refit(model, extent=extent, fits_inputs=False)
        assert {name.split(".")[-2] for name in without.weights} <= outputs
        assert {product.layers for product in without.products} <= {tuple(group) for group in PLAN.groups}


@pytest.mark.parametrize("family", EXPERTS)
def test_a_mixture_of_experts_is_fitted_by_its_attention_alone(family: str) -> None:
    model = build_tiny_model(family)
    found = refit(model, extent="grouped")
    assert [name.split(".")[1] for name in found.not_fitted] == ["1", "2", "4", "5"]
    assert all(".mlp" in name for name in found.not_fitted)
    of_experts = [(p.layers, p.module) for p in found.products if p.module.startswith("mlp")]
    assert of_experts == ([((1,), "mlp.gate_proj")] if family == "qwen3_moe" else []), "its layer 1 has no experts"
    assert {p.module for p in found.products} >= {"self_attn.q_proj", "self_attn.o_proj"}
    attention = {name.split(".")[-2] for name in found.weights if "self_attn" in name}
    assert attention == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_other_families_are_fitted_whole() -> None:
    for family in set(FAMILIES) - set(EXPERTS):
        found = refit(build_tiny_model(family), extent="grouped")
        assert found.not_fitted == ()
        outputs, inputs = (
            [p for p in found.products if (p.layers in {(1, 2), (4, 5)}) == flag] for flag in (True, False)
        )
        assert len(outputs) == 4
        read = {(p.layers, p.module.split(".")[0]) for p in inputs}
        behind = {((2,), ""), ((4,), ""), ((5,), "")}
        assert {(layers, "") for layers, _ in read} >= behind, "the first attention alone reads what it did"
        assert len({module for _, module in read}) == 2


@pytest.mark.parametrize("family", POST_NORM)
def test_behind_a_post_norm_the_fit_is_of_first_order(family: str) -> None:
    """A small part of the change does what the regression says, to first order; the whole of it does not."""
    model = build_tiny_model(family)
    plan, windows = Plan.from_groups([[0], [1, 2], [3], [4], [5]]), build_windows()
    found = refit(model, plan, windows, extent="grouped", ridges=(0.1,), fits_inputs=False)
    attention = {name: w.double() for name, w in found.weights.items() if "o_proj" in name}
    untouched = measure_errors(model, {}, windows, plan)[1]

    def measure(share: float) -> float:
        begun = {
            name: torch.lerp(model.get_parameter(name).double(), w, share).float() for name, w in attention.items()
        }
        return measure_errors(model, begun, windows, plan)[1]

    falls = [untouched - measure(share) for share in (0.05, 0.1, 0.2)]
    assert 0 < falls[0] < falls[1] < falls[2]
    assert falls[1] / falls[0] == pytest.approx(2, rel=0.1)
    product = found.products[0]
    assert untouched - measure(1.0) > 0.5 * (product.error_before - product.error_after)


def test_a_fit_behind_a_post_norm_that_does_not_help_is_not_taken() -> None:
    """Where norms are small beside what is to be repaired, the first order may promise what the norm does not keep."""
    model = build_tiny_model("glm4")
    for name, parameter in model.named_parameters():
        if "post_self_attn_layernorm" in name or "post_mlp_layernorm" in name:
            parameter.mul_(0.1)
    plan, windows = Plan.from_groups([[0], [1, 2], [3], [4], [5]]), build_windows()
    validation = Windows(windows.input_ids[4::5], windows.spec)
    found = refit(model, plan, windows, extent="grouped")
    of_groups = {product.module: product.ridge for product in found.products if product.layers == (1, 2)}
    assert {module: ridge is None for module, ridge in of_groups.items()} == {
        "self_attn.o_proj": False,
        "mlp.down_proj": True,
    }
    assert "down_proj" not in {name.split(".")[-2] for name in found.weights}
    repaired, untouched = (measure_errors(model, weights, validation, plan)[1] for weights in (found.weights, {}))
    assert repaired < untouched


def test_a_refit_is_never_worse_than_nothing_on_its_validation_windows() -> None:
    """With little text, most regressions are refused; what is left does not raise the error."""
    plan = Plan.from_groups([[0], [1, 2], [3], [4], [5]])
    for seed in range(6):
        model, windows = build_tiny_model("llama", seed=seed), build_windows(5, seed)
        found = refit(model, plan, windows, extent="grouped", ridges=(1e-3, 1e-2))
        for product in found.products:
            assert product.error_after <= product.error_before
            assert (product.error_after == product.error_before) == (product.ridge is None)
        validation = Windows(windows.input_ids[4::5], windows.spec)
        repaired, untouched = (measure_errors(model, weights, validation, plan)[1] for weights in (found.weights, {}))
        assert repaired <= untouched


def test_a_ridge_that_forbids_any_change_changes_nothing(model: PreTrainedModel) -> None:
    found = refit(model, ridges=(1e12,))
    for name, weight in found.weights.items():
        assert torch.allclose(weight, model.get_parameter(name), atol=1e-6)


def test_a_second_pass_lowers_the_error_where_there_is_text_enough(model: PreTrainedModel) -> None:
    windows, unseen = build_windows(400), build_windows(50, seed=1)
    reports: list[tuple[int, int]] = []
    errors = []
    for num_passes in (1, 2, 3):
        refitter = Refitter(model, windows, num_passes=num_passes)
        found = refitter.fit(PLAN, on_progress=lambda done, total: reports.append((done, total)))
        errors.append(measure_errors(model, found.weights, unseen, PLAN)[-1])
        assert len(found.products) == num_passes * (6 + 7), "the first attention reads what it did"
    assert errors[2] <= errors[1] < errors[0]
    totals = [total for _, total in reports]
    assert sorted(set(totals)) == [4, 8, 12]
    for total in (4, 8, 12):
        done = [done for done, reported in reports if reported == total]
        assert done == sorted(done)
        assert done[-1] == total


def test_the_refitter_takes_one_plan_after_another(model: PreTrainedModel) -> None:
    windows, other = build_windows(), Plan.from_groups([[0, 1], [2], [3, 4, 5]])
    refitter = Refitter(model, windows)
    both = [refitter.fit(plan) for plan in (PLAN, other, PLAN)]
    alone = [Refitter(model, windows).fit(plan) for plan in (PLAN, other, PLAN)]
    for found, expected in zip(both, alone, strict=True):
        assert found.products == expected.products
        assert found.weights.keys() == expected.weights.keys()
        assert all(torch.equal(found.weights[name], expected.weights[name]) for name in found.weights)


def test_the_size_of_a_batch_decides_nothing_but_rounding(model: PreTrainedModel) -> None:
    whole, small = refit(model, batch_size=40), refit(model, batch_size=3)
    assert [p.ridge for p in whole.products] == [p.ridge for p in small.products]
    for name, weight in whole.weights.items():
        assert float((weight - small.weights[name]).norm() / weight.norm()) < FLOAT32_REFIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_come_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = build_tiny_model("llama").to(dtype)
    found = refit(model)
    assert {weight.dtype for weight in found.weights.values()} == {dtype}
    unseen = build_windows(16, seed=1)
    model.float()
    weights = {name: weight.float() for name, weight in found.weights.items()}
    assert measure_errors(model, weights, unseen, PLAN)[-1] < 0.7 * measure_errors(model, {}, unseen, PLAN)[-1]


# ---- Kinds of text ---------------------------------------------------------------------------------------------------


def test_the_weight_of_a_kind_decides_what_is_repaired(model: PreTrainedModel) -> None:
    windows = build_windows(200, num_kinds=2)
    unseen = build_windows(16, seed=1, num_kinds=2).split_kinds()
    errors = {}
    for name, shares in {"first": (1.0, 1e-4), "both": (1.0, 1.0), "second": (1e-4, 1.0)}.items():
        found = refit(model, windows=windows, window_weights=[shares[n % 2] for n in range(windows.num_windows)])
        errors[name] = [measure_errors(model, found.weights, part, PLAN)[-1] for part in unseen]
    assert errors["first"][0] < errors["both"][0] < errors["second"][0]
    assert errors["second"][1] < errors["both"][1] < errors["first"][1]


@pytest.mark.parametrize("num_kinds", [1, 5])
def test_every_kind_of_text_chooses_the_ridge(model: PreTrainedModel, num_kinds: int) -> None:
    """Five kinds come in turn, and one window in five chooses the ridge: it must not be the same kind each time."""
    windows = build_windows(10, num_kinds=num_kinds)
    # A window counts 1 if it is of the first kind, or as good as nothing: without one that chooses there is no error.
    shares = [1.0 if n % num_kinds == 0 else 1e-9 for n in range(windows.num_windows)]
    found = refit(model, windows=windows, window_weights=shares)
    assert found.products[0].error_before > 1e-3
    with pytest.raises(
        DataError, match=r"4 windows are too few .*; give at least 5 of each kind of text \(--windows\)"
    ):
        refit(model, windows=build_windows(4))


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_too_little_text_is_refused_with_how_much_is_needed(model: PreTrainedModel) -> None:
    few = Windows(build_windows(10).input_ids[:, :8], "few")
    with pytest.raises(DataError, match=r"64 tokens to fit are too few for the 96 inputs .* at least 15 windows of 8"):
        refit(model, windows=few)
    enough = Windows(build_windows(15).input_ids[:, :8], "enough")
    assert refit(model, windows=enough).products


def test_a_plan_that_joins_nothing_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(
        PlanError, match="joins and drops nothing, so there is nothing to refit; give a plan with groups"
    ):
        refit(model, Plan.baseline(6))


def test_plans_of_other_models_and_planned_models_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(PlanError, match="8 layers"):
        refit(model, Plan.from_joins(8, [1]))
    identity = ModelIdentity(id="other", num_layers=6, fingerprint="0" * 16 + "-" + "1" * 16)
    with pytest.raises(PlanError, match="the plan is for other"):
        refit(model, Plan(PLAN.groups, PlanMetadata(model=identity)))
    apply_plan(model, PLAN)
    with pytest.raises(ModelError, match="a plan is applied"):
        refit(model)
    undo_plan(model)


def test_quantised_weights_are_refused_by_name(model: PreTrainedModel) -> None:
    layer = model.model.layers[2].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj\.weight is quantised \(torch\.int8\)"):
        Refitter(model, build_windows())


def test_sums_that_do_not_fit_are_refused_before_anything_runs(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    refitter = Refitter(model, build_windows())
    memory = psutil.virtual_memory()._replace(available=8 * 96**2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(
        LpsearchError, match=r"cpu: the fit needs .* GB for sums over 96 inputs, and .* a plan of smaller"
    ):
        refitter.fit(PLAN)


def test_weights_are_swapped_back_whatever_happens(model: PreTrainedModel) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    parameter = model.get_parameter(name)
    before, data = parameter.clone(), parameter.data_ptr()

    def fail() -> None:
        with swapped_weights(model, {name: torch.zeros_like(parameter)}):
            assert not parameter.any()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert parameter.data_ptr() == data
    assert torch.equal(parameter, before)
