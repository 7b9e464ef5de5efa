"""Tables of tiny models against evaluating each plan by itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lpsearch.config import Allowed
from lpsearch.data import Windows
from lpsearch.errors import DataError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace
from studies import enumerate_front
from studies.enumerate_front import PlanLosses, Space
from studies.mixed_regret import load_mixed_table
from studies.tables import load_table
from studies.windows_file import save_windows
from tests.tiny_models import VOCAB_SIZE, build_tiny_model
from tests.tolerances import FLOAT32_LOSS, STORED_FLOAT32

NUM_LAYERS = 6
EVERYTHING: tuple[Allowed, ...] = ("joins", "drop-attention", "drop-mlp")


def list_masks(space: Space) -> set[int]:
    """All sets of joins between the layers of a space whose runs are short enough, one after the other."""
    masks = set()
    for bits in itertools.product("01", repeat=space.num_layers - 1):
        joins = [i for i, bit in enumerate(bits) if bit == "1"]
        inside = all(space.first_layer <= i < space.stop_layer - 1 for i in joins)
        short = all(len(run) < space.max_group for run in "".join(bits).split("0"))
        if inside and short and (space.max_joins is None or len(joins) <= space.max_joins):
            masks.add(sum(1 << i for i in joins))
    return masks


def build_random_windows() -> Windows:
    rng = np.random.default_rng(0)
    return Windows(rng.integers(3, VOCAB_SIZE, (3, 16), dtype=np.int32), "random")


def check_against_each_plan(losses: PlanLosses, model: PreTrainedModel, windows: Windows) -> None:
    """One plan and one window after the other."""
    evaluator = ModelEvaluator(model=model, windows=windows, cache_bytes=0)
    for mask, window_nll, nll in zip(losses.masks.tolist(), losses.window_nll, losses.nll, strict=True):
        plan = Plan.from_joins(NUM_LAYERS, [i for i in range(NUM_LAYERS - 1) if mask >> i & 1])
        expected = [evaluator.evaluate_windows(plan, [i]).nll_nats_per_token[0] for i in range(windows.num_windows)]
        assert window_nll.tolist() == pytest.approx(expected, abs=FLOAT32_LOSS)
        assert nll == pytest.approx(sum(expected) / len(expected), abs=FLOAT32_LOSS)


@pytest.mark.parametrize(
    ("family", "space"),
    [
        ("llama", Space(NUM_LAYERS, 0, NUM_LAYERS)),
        ("llama", Space(NUM_LAYERS, 1, 5, max_group=3)),
        ("gemma2", Space(NUM_LAYERS, 1, NUM_LAYERS, max_joins=2)),
        ("gpt_neox", Space(NUM_LAYERS, 0, 5)),
        ("cohere", Space(NUM_LAYERS, 2, NUM_LAYERS)),
    ],
)
@pytest.mark.parametrize("batch_plans", [1, 3, 64])
def test_losses_are_those_of_each_plan_by_itself(family: str, space: Space, batch_plans: int):
    model = build_tiny_model(family, num_layers=NUM_LAYERS)
    windows = build_random_windows()
    losses = enumerate_front.enumerate_losses(model, windows, space, batch_plans=batch_plans)
    assert losses.masks.tolist() == sorted(list_masks(space))
    assert len(losses.masks) == space.count_plans()
    check_against_each_plan(losses, model, windows)


@pytest.mark.parametrize(("family", "allow"), [("llama", EVERYTHING), ("gpt_neox", ("drop-attention", "drop-mlp"))])
def test_losses_of_plans_that_drop_are_those_of_each_plan_by_itself(family: str, allow: tuple[Allowed, ...]):
    model = build_tiny_model(family, num_layers=NUM_LAYERS)
    windows = build_random_windows()
    space = Space(NUM_LAYERS, 2, 5, allow=allow)
    losses = enumerate_front.enumerate_losses(model, windows, space, batch_plans=7)
    assert losses.dropped_attention is not None
    assert losses.dropped_mlp is not None
    evaluator = ModelEvaluator(model=model, windows=windows, cache_bytes=0)
    plans = []
    rows = zip(losses.masks, losses.dropped_attention, losses.dropped_mlp, losses.window_nll, strict=True)
    for joins, attention, mlp, window_nll in rows:
        listed = [[i for i in range(NUM_LAYERS) if bits >> i & 1] for bits in map(int, (joins, attention, mlp))]
        plans.append(Plan.from_joins(NUM_LAYERS, listed[0]).drop({"attention": listed[1], "mlp": listed[2]}))
        expected = evaluator.evaluate_windows(plans[-1], range(3)).nll_nats_per_token
        assert window_nll.tolist() == pytest.approx(expected, abs=FLOAT32_LOSS)
    assert plans[0] == Plan.baseline(NUM_LAYERS)
    whole = PlanSpace(NUM_LAYERS, 2, (0, 1, 5), allow)
    assert len(plans) == space.count_plans() == whole.count_plans()
    assert set(plans) == set(whole.enumerate_plans())


def test_a_table_with_drops_is_for_the_script_that_replays_it(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "table.npz"
    arguments = ["--model", str(tiny_model_dir), "--data", str(text_file), "--windows", "2", "--seq-len", "24"]
    arguments += ["--layers", "1-3", "--dtype", "float32", "--device", "cpu", "--out", str(out), "--renumber"]
    assert enumerate_front.main([*arguments, "--allow", "joins,drops"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    table = load_mixed_table(out)
    assert len(table.nll) == document["plans"] == PlanSpace(3, allow=EVERYTHING).count_plans() + 1
    assert table.nll[Plan.baseline(3)] == pytest.approx(document["baseline_nll"], abs=STORED_FLOAT32)
    with pytest.raises(DataError, match=r"mixed_regret\.py"):
        load_table(out)
    assert enumerate_front.main([*arguments, "--allow", "splits"]) == 2
    assert "'splits' is none of joins" in capsys.readouterr().err


def test_leaves_the_model_as_it_was():
    model = build_tiny_model("llama")
    ids = torch.tensor(build_random_windows().input_ids, dtype=torch.long)
    before = model(input_ids=ids).logits
    enumerate_front.enumerate_losses(model, build_random_windows(), Space(NUM_LAYERS, 0, NUM_LAYERS))
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@pytest.mark.parametrize("renumber", [False, True])
def test_writes_a_table_that_can_be_replayed(
    renumber: bool, tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "table.npz"
    arguments = ["--model", str(tiny_model_dir), "--data", str(text_file), "--windows", "2", "--seq-len", "24"]
    arguments += ["--layers", "1-4", "--dtype", "float32", "--device", "cpu", "--out", str(out)]
    assert enumerate_front.main([*arguments, *(["--renumber"] if renumber else [])]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["plans"], document["layers"]) == (5, [1, 5])
    table = load_table(out, frozen_layers=() if renumber else (0, 5))
    assert table.space.num_layers == (4 if renumber else NUM_LAYERS)
    assert set(table.masks.tolist()) == {mask << (not renumber) for mask in (0, 1, 2, 4, 5)}
    assert table.get_nll(0) == pytest.approx(document["baseline_nll"], abs=STORED_FLOAT32)


def test_keeps_the_loss_of_every_window(tiny_model_dir: Path, tmp_path: Path):
    """Windows from a file, of which the first two and their first ten tokens are taken."""
    windows = build_random_windows()
    save_windows(tmp_path / "windows.npz", windows)
    out = tmp_path / "table.npz"
    arguments = ["--model", str(tiny_model_dir), "--data", str(tmp_path / "windows.npz"), "--windows", "2"]
    arguments += ["--seq-len", "10", "--by-window", "--dtype", "float32", "--device", "cpu", "--out", str(out)]
    assert enumerate_front.main(arguments) == 0
    with np.load(out) as archive:
        masks, nll, window_nll = archive["mask"], archive["nll"], archive["window_nll"]
    assert (window_nll.dtype, window_nll.shape) == (np.float32, (len(masks), 2))
    np.testing.assert_allclose(window_nll.mean(axis=1), nll, rtol=STORED_FLOAT32)
    losses = PlanLosses(masks.astype(np.int64), window_nll.astype(np.float64))
    model = build_tiny_model("llama", vocab_size=512)
    check_against_each_plan(losses, model, Windows(windows.input_ids[:2, :10], "random"))


@pytest.mark.parametrize(
    "options", [("--layers", "3-9"), ("--layers", "1,3"), ("--max-group", "1"), ("--out", "nowhere/table.npz")]
)
def test_impossible_options_are_refused(
    options: tuple[str, str], tiny_model_dir: Path, text_file: Path, tmp_path: Path
):
    arguments = ["--model", str(tiny_model_dir), "--data", str(text_file), "--windows", "1", "--seq-len", "8"]
    arguments += ["--device", "cpu", "--out", str(tmp_path / "table.npz"), *options]
    assert enumerate_front.main(arguments) == 2


@pytest.mark.gpu
def test_losses_on_a_gpu_are_those_of_each_plan_by_itself():
    model = build_tiny_model("llama", num_layers=NUM_LAYERS).to("cuda")
    windows = build_random_windows()
    space = Space(NUM_LAYERS, 0, NUM_LAYERS)
    losses = enumerate_front.enumerate_losses(model, windows, space, batch_plans=4, compile_loss=True)
    check_against_each_plan(losses, model, windows)
