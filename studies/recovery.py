r"""Measure what a refit, and distilling after it, win back of a plan's loss on text that neither saw.

Each ``--text NAME=TRAIN,TEST[,WEIGHT]`` is a kind of text: windows files that ``windows_file.py`` wrote. The last 16
windows of TRAIN are not trained on, but choose the best step; without TEST a kind is trained on and not measured.
``--sampled N`` adds windows sampled from the model, 64 of them for the test. The table has the loss of the plan against
the unmodified model by kind, untouched, refitted and distilled, each with its standard error over windows. A plan has
joins, and with ``--drop-attention`` and ``--drop-mlp`` also dropped branches.

    python studies/recovery.py --model smollm2-135m --joins 4,7,17,21,24,26 --text wiki=valid.npz,test.npz \
        --text code=code-train.npz,code-test.npz --sampled 1280 --fit-windows 320 --tokens 18000000
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.commands.loading import describe_device, resolve_device
from lpsearch.config import LEARNING_RATE, Split
from lpsearch.data import Windows, build_windows
from lpsearch.errors import ConfigError, LpsearchError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.evaluation.losses import PairedDelta, compute_paired_delta
from lpsearch.models import LoadedModel, load_model, resolve_source
from lpsearch.plan import Plan
from lpsearch.recovery import swapped_weights
from lpsearch.recovery.by_loss import refit_by_loss
from lpsearch.recovery.distill import DistillSettings, distill
from lpsearch.recovery.mixture import Mixture
from studies.windows_file import get_windows

VALIDATION_WINDOWS = 16
TEST_WINDOWS = 64


@dataclass(frozen=True)
class Kind:
    """One kind of text.

    Attributes:
        training: windows to train on, and the first of them to fit to.
        validation: windows that choose the best step.
        test: windows to measure on; None for a kind that is only trained on.
        weight: how often it is trained on, against 1.
    """

    training: Windows
    validation: Windows
    test: Windows | None
    weight: float = 1.0


def read_kinds(options: argparse.Namespace, loaded: LoadedModel) -> dict[str, Kind]:
    """Read or sample the windows of every kind, by name."""
    kinds = {}
    for text in options.text:
        name, _, rest = text.partition("=")
        files = rest.split(",")
        if not name or not 1 <= len(files) <= 3 or not files[0]:
            raise ConfigError(f"--text {text}: expected NAME=TRAIN,TEST[,WEIGHT]")
        test = None
        if len(files) > 1 and files[1]:
            test = get_windows(files[1], loaded, num_windows=options.test_windows, seq_len=options.seq_len)
        training = get_windows(files[0], loaded, num_windows=None, seq_len=options.seq_len)
        kinds[name] = _split(training, test, float(files[2]) if len(files) > 2 else 1.0)
    if options.sampled:
        kinds["sampled"] = _split(*sample(options, loaded), options.sampled_weight)
    if not kinds:
        raise ConfigError("there is no text; give --text or --sampled")
    return kinds


def sample(options: argparse.Namespace, loaded: LoadedModel) -> tuple[Windows, Windows]:
    """Sample windows to train on, on a GPU from the model in bfloat16, and windows to measure on, in its own dtype."""
    low = loaded
    if loaded.model.device.type == "cuda":
        low = load_model(resolve_source(options.model), device=loaded.model.device, dtype=torch.bfloat16)
    kinds: list[Windows] = []
    splits: tuple[tuple[Split, int, LoadedModel], ...] = (
        ("proxy", options.sampled, low),
        ("heldout", options.test_windows, loaded),
    )
    for split, count, source in splits:
        began = time.perf_counter()
        kinds.append(
            build_windows(
                "self",
                tokenizer=source.tokenizer,
                num_windows=count,
                seq_len=options.seq_len,
                split=split,
                seed=options.seed,
                model=source.model,
            )
        )
        print(f"{count} {split} windows: {time.perf_counter() - began:.1f} s", flush=True)
    return kinds[0], kinds[1]


def _split(training: Windows, test: Windows | None, weight: float) -> Kind:
    num_kept = training.num_windows - min(VALIDATION_WINDOWS, training.num_windows // 4)
    return Kind(
        Windows(training.input_ids[:num_kept], training.spec),
        Windows(training.input_ids[num_kept:], training.spec),
        test,
        weight,
    )


def mix_to_fit(kinds: Mapping[str, Kind], num_windows: int | None) -> Windows:
    """Let the first windows of every kind take turns, so that every part of the mixture holds every kind."""
    parts = [kind.training.input_ids[:num_windows] for kind in kinds.values()]
    places = np.concatenate([np.linspace(0, 1, len(part), endpoint=False) for part in parts])
    return Windows(np.concatenate(parts)[np.argsort(places, kind="stable")], "mixed")


class Meter:
    """Measures a plan against the unmodified model on the test windows of every kind."""

    def __init__(self, model: Any, kinds: Mapping[str, Kind], plan: Plan) -> None:
        tests = {name: kind.test for name, kind in kinds.items() if kind.test is not None}
        self._plan = plan
        self._evaluators = {
            name: ModelEvaluator(model=model, windows=test, cache_bytes=0) for name, test in tests.items()
        }
        baseline = Plan.baseline(plan.num_layers)
        self._base = {name: self._evaluate(name, baseline) for name in tests}

    def measure(self) -> dict[str, PairedDelta]:
        """Return the loss under the plan less the unmodified model's, by kind."""
        return {
            name: compute_paired_delta(self._evaluate(name, self._plan), self._base[name]) for name in self._evaluators
        }

    def _evaluate(self, name: str, plan: Plan) -> tuple[float, ...]:
        evaluator = self._evaluators[name]
        return evaluator.evaluate_windows(plan, range(evaluator.num_windows)).nll_nats_per_token


def run(options: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """Refit, distil and measure; return the rows."""
    model, kinds = loaded.model, read_kinds(options, loaded)
    plan = build_plan(options, loaded.identity.num_layers)
    meter = Meter(model, kinds, plan)
    rows = [{"weights": "untouched", "seconds": 0.0, "tokens": 0, "losses": meter.measure()}]
    began = time.perf_counter()
    fitted = mix_to_fit(kinds, options.fit_windows)
    refit = refit_by_loss(
        model,
        plan,
        fitted,
        mix_to_fit({name: Kind(kind.validation, kind.validation, None) for name, kind in kinds.items()}, None),
        extent=options.extent,
        num_passes=options.passes,
    )
    seconds = time.perf_counter() - began
    with swapped_weights(model, refit.weights):
        losses = meter.measure()
    rows.append({"weights": "refit", "seconds": seconds, "tokens": fitted.input_ids.size, "losses": losses})
    if options.tokens:
        distilled = distill(
            model,
            plan,
            training=Mixture(
                {name: kind.training for name, kind in kinds.items()},
                {name: kind.weight for name, kind in kinds.items()},
            ),
            validation={name: kind.validation for name, kind in kinds.items() if kind.test is not None},
            settings=DistillSettings(
                num_tokens=options.tokens,
                tokens_per_step=options.tokens_per_step,
                learning_rate=options.learning_rate,
                train=options.train,
                seed=options.seed,
                patience=None,
            ),
            weights=refit.weights,
            on_progress=lambda step, steps, loss, share: print(f"{step}/{steps} {loss:.4f} {share:.3f}", flush=True),
        )
        weights = {name: weight.to(model.device) for name, weight in distilled.weights.items()}
        with swapped_weights(model, weights):
            losses = meter.measure()
        rows.append(
            {"weights": "distilled", "seconds": distilled.seconds, "tokens": distilled.tokens, "losses": losses}
        )
    return {"joins": list(plan.joins), "dropped": plan.dropped, "depth_reduction": plan.depth_reduction, "rows": rows}


def build_plan(options: argparse.Namespace, num_layers: int) -> Plan:
    """Return the plan of the joins and drops that were asked for."""
    joins, attention, mlp = (
        [int(number) for number in text.split(",") if number]
        for text in (options.joins, options.drop_attention, options.drop_mlp)
    )
    return Plan.from_joins(num_layers, joins).drop({"attention": attention, "mlp": mlp})


def print_table(found: dict[str, Any]) -> None:
    """Print the rows, with the share of the untouched loss that is won back."""
    rows = found["rows"]
    names = list(rows[0]["losses"])
    print(f"{'weights':<12}{'seconds':>9}{'tokens':>12}" + "".join(f"{name:>26}" for name in names))
    for row in rows:
        cells = []
        for name in names:
            loss, untouched = row["losses"][name], rows[0]["losses"][name].delta
            cells.append(f"{loss.delta:+.4f} ±{loss.standard_error or 0:.4f} {1 - loss.delta / untouched:>6.1%}")
        print(f"{row['weights']:<12}{row['seconds']:>9.1f}{row['tokens']:>12,}" + "".join(f"{c:>26}" for c in cells))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; print the table, and the same as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="alias, hub id, directory or .gguf file")
    parser.add_argument("--joins", default="", help="joins of the plan, e.g. 4,7,17")
    parser.add_argument("--drop-attention", default="", help="layers without their attention, e.g. 5,20")
    parser.add_argument("--drop-mlp", default="", help="layers without their MLP")
    parser.add_argument("--text", action="append", default=[], help="NAME=TRAIN,TEST[,WEIGHT]; may be repeated")
    parser.add_argument("--sampled", type=int, default=0, help="windows to sample from the model")
    parser.add_argument("--sampled-weight", type=float, default=1.0, help="how often they are trained on")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window")
    parser.add_argument("--test-windows", type=int, default=TEST_WINDOWS, help="windows of a kind to measure on")
    parser.add_argument("--fit-windows", type=int, default=320, help="windows of a kind to fit to, at most")
    parser.add_argument("--extent", choices=["grouped", "after"], default="after", help="layers that are fitted")
    parser.add_argument("--passes", type=int, default=1, help="walks of the refit")
    parser.add_argument("--tokens", type=int, default=0, help="tokens to distil on; 0 for the refit alone")
    parser.add_argument("--tokens-per-step", type=int, default=16384)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--train", choices=["all", "grouped"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        device = resolve_device(options.device)
        loaded = load_model(resolve_source(options.model), device=device, dtype=torch.float32)
        found = run(options, loaded)
    except LpsearchError as error:
        print(f"recovery: {error}", file=sys.stderr)
        return error.exit_code
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{options.model}, {describe_device(device)}, {versions}")
    print_table(found)
    for row in found["rows"]:
        row["losses"] = {name: [loss.delta, loss.standard_error] for name, loss in row["losses"].items()}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
