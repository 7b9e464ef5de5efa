r"""Predicted and measured speed-up of plans in each engine: does the additive latency model hold there?

The depths that ``lpsearch profile --engine`` fits to, the unmodified model, a copy of it, and plans that nothing is
fitted to run in turns, in one process. So what else the machine does meets all of them alike. A time is compared with
the unmodified model's in the same round; the median of this ratio over rounds is what costs are fitted to, and what is
compared with the estimate. The copy says how large a difference is noise: on a perfect clock it is at 1.000x. This
leaves out how far a machine changes between a profile and the day that it is used.

Each engine has a process of its own, so that one that crashes or hangs (``--limit``) takes nothing with it. Weights are
random, so nothing is downloaded. Engines that are not installed or do not run on the device are named and left out.

On a machine that others use, wall times say more of them than of the engine. ``--clock cpu`` counts the processor time
of the process instead, which on one thread is the wall time of an idle machine. Of llama.cpp, whose own clock is the
wall's, it then takes a whole call, in which the last token of the prompt is one more step.

    python studies/engine_times.py                                                   # what runs on this CPU
    python studies/engine_times.py --engines transformers --device cpu --seconds 60  # one of them, for longer
    OMP_NUM_THREADS=1 python studies/engine_times.py --clock cpu                     # beside other work
    python studies/engine_times.py --engines runtime,transformers --model llama3.2-1b --device cuda --dtype bfloat16 \
        --context 1024 --limit 120
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, PretrainedConfig

from lpsearch.errors import LpsearchError
from lpsearch.latency import timing
from lpsearch.latency.allow import DROPS, JOINS
from lpsearch.latency.depths import Depth, choose_depths, find_group_kinds
from lpsearch.latency.engines import (
    build_engine_steps,
    check_engine,
    generate,
    llama_cpp,
    read_engine_versions,
    vllm_offline,
)
from lpsearch.latency.measure import _fit_costs, name_device
from lpsearch.latency.model import GroupCosts
from lpsearch.latency.profile import Engine, MeasuredPoint, ProfileGeometry
from lpsearch.latency.runtime.steps import RuntimeSteps
from lpsearch.latency.sums import OneRank
from lpsearch.latency.timing import MIN_BLOCKS, StepTiming, measure_interleaved
from lpsearch.latency.workload import StepBuilder, Workload
from lpsearch.models import load_geometry
from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan
from lpsearch.versions import read_versions

ENGINES: tuple[Engine, ...] = get_args(Engine)
BAR = 0.02
"""What predicted and measured speed-ups may differ by."""

SHAPES = {"tiny": (256, 768, 8, 4), "small": (576, 1536, 9, 3)}
"""Hidden size, intermediate size, heads and key-value heads; ``small`` is a layer of SmolLM2-135M."""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--model", help="an alias whose geometry is bundled, instead of --shape")
    parser.add_argument("--layers", type=int, help="number of layers; default: 12, or those of --model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--drops", action="store_true", help="also plans that drop branches")
    parser.add_argument("--plans", type=int, default=5, help="held-out plans")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing an engine; at least 30 rounds are run")
    parser.add_argument(
        "--limit",
        type=float,
        default=3600.0,
        help="seconds for an engine; plans not built by half of it are left out",
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one engine, in this process
    return parser.parse_args()


def build_config(arguments: argparse.Namespace) -> PretrainedConfig:
    """Return the configuration whose shape is timed."""
    if arguments.model:
        config = load_geometry(arguments.model)
        if arguments.layers:
            config.num_hidden_layers = arguments.layers
        return config
    hidden, intermediate, heads, kv_heads = SHAPES[arguments.shape]
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=arguments.layers or 12,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max(2048, arguments.context + 1),
        tie_word_embeddings=True,
    )


def draw_plans(num_layers: int, *, count: int, drops: bool, seed: int) -> Iterator[Plan]:
    """Yield plans of pairs at random places, of as many depths, some of them without some branches."""
    rng = random.Random(seed)
    for index in range(count):
        num_pairs = max(1, round((index + 1) * num_layers / 2 / (count + 1)))
        alone = num_layers - 2 * num_pairs
        sizes = rng.sample([2] * num_pairs + [1] * alone, num_pairs + alone)
        starts = [sum(sizes[:position]) for position in range(len(sizes))]
        plan = Plan.from_groups([range(start, start + size) for start, size in zip(starts, sizes, strict=True)])
        if drops and index % 2:
            dropped = {
                branch: rng.sample(range(num_layers), max(1, num_layers // 6)) for branch in ("attention", "mlp")
            }
            plan = plan.drop(dropped)
        yield plan


@contextmanager
def count_processor_time() -> Iterator[None]:
    """Let every engine be timed by the processor time of this process."""
    clock = SimpleNamespace(perf_counter=time.process_time)
    complete = llama_cpp._complete

    def complete_timed(server: Any, request: Mapping[str, Any]) -> dict[str, Any]:
        began = time.process_time()
        answer = complete(server, request)
        num_steps = request["n_predict"] - 1
        answer["timings"]["predicted_ms"] = (time.process_time() - began) * 1e3 * num_steps / (num_steps + 1)
        return answer

    with ExitStack() as stack:
        for module in (timing, generate, vllm_offline):
            stack.enter_context(patch.object(module, "time", clock))
        stack.enter_context(patch.object(llama_cpp, "_complete", complete_timed))
        yield


def compare_rounds(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the median over rounds of the ratio of two times, and its 95 % bootstrap interval (Efron 1979)."""
    ratios = first / second
    resampled = np.random.default_rng(0).choice(ratios, size=(1000, len(ratios)))
    low, high = np.percentile(np.median(resampled, axis=1), (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


def list_depths(geometry: ProfileGeometry, *, drops: bool) -> list[Depth]:
    """List the depths that a profile is fitted to, the unmodified model first."""
    depths = choose_depths(geometry, num_layers=geometry.num_layers, max_group=2, allow=find_allowed(drops))
    return [depth for depth in depths if depth.use == "fit"]


def find_allowed(drops: bool) -> frozenset[str]:
    """Return what plans may do."""
    return frozenset(JOINS | DROPS if drops else JOINS)


def time_in_turns(
    engine: Engine,
    config: PretrainedConfig,
    depths: Sequence[Depth],
    plans: Sequence[Plan],
    arguments: argparse.Namespace,
) -> tuple[StepBuilder, list[StepTiming], float]:
    """Time depths and then plans, as many of these as can be built in time.

    Returns:
        What ran them, their times, and the seconds that building took.
    """
    began = time.monotonic()
    traits, device = read_traits(config), torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    workload = Workload("decode", arguments.batch, arguments.context)
    builder: StepBuilder
    if engine == "runtime":
        builder = RuntimeSteps(traits, workload, device=device, dtype=dtype, ranks=OneRank())
    else:
        check_engine(engine, traits, device=device, workloads=[workload])
        builder = build_engine_steps(engine, traits, workload, device=device, dtype=dtype)
    try:
        with torch.inference_mode():
            builder.reserve(traits.num_layers)
            mode: Any = builder.modes[0]
            steps = [builder.build(depth.plan, depth.layers, mode) for depth in depths]
            for plan in plans:
                if len(steps) > len(depths) + 1 and time.monotonic() - began > arguments.limit / 2:
                    break
                steps.append(builder.build(plan, range(traits.num_layers), mode))
            built_s = time.monotonic() - began
            timings = measure_interleaved(
                [step.run for step in steps],
                device=device,
                budget_s=arguments.seconds,
                min_blocks=MIN_BLOCKS,
                are_clocked=steps[0].is_clocked,
            )
    finally:
        builder.close()
    return builder, timings, built_s


def fit_costs(
    geometry: ProfileGeometry, depths: Sequence[Depth], timings: Sequence[StepTiming], *, drops: bool, fuses: bool
) -> GroupCosts:
    """Fit costs to times relative to the unmodified model's, as a profile's are to times."""
    base = timings[0]
    points = []
    for depth, found in zip(depths, timings, strict=True):
        ratio = compare_rounds(base.blocks_ms, found.blocks_ms)[0]
        points.append(
            MeasuredPoint(
                num_groups=depth.count_groups(geometry),
                use="fit",
                median_ms=base.median_ms / ratio,
                p10_ms=found.p10_ms,
                p90_ms=found.p90_ms,
                num_samples=len(found.blocks_ms),
            )
        )
    kinds = find_group_kinds(geometry, max_group=2, allow=find_allowed(drops))
    return _fit_costs(geometry, depths, points, kinds, by_stage=drops, fuses=fuses)


def measure_engine(engine: Engine, config: PretrainedConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the depths of a profile and the held-out plans in turns; fit to the first, and predict the others."""
    began = time.monotonic()
    geometry = ProfileGeometry.from_config(config)
    depths = list_depths(geometry, drops=arguments.drops)
    drawn = list(draw_plans(geometry.num_layers, count=arguments.plans, drops=arguments.drops, seed=arguments.seed))
    plans = [Plan.baseline(geometry.num_layers), *drawn[::2], *drawn[1::2]]  # few of them are of many depths, too
    builder, timings, built_s = time_in_turns(engine, config, depths, plans, arguments)
    costs = fit_costs(geometry, depths, timings[: len(depths)], drops=arguments.drops, fuses=builder.fuses)

    def predict_ms(plan: Plan) -> float:
        return costs.estimate_latency_ms(geometry.count_groups(plan.groups))

    rows: list[dict[str, Any]] = []
    for plan, found in zip(plans, timings[len(depths) :], strict=False):
        speedup, low, high = compare_rounds(timings[0].blocks_ms, found.blocks_ms)
        rows.append(
            {
                "depth": plan.depth,
                "num_dropped": sum(map(len, plan.dropped.values())),
                "median_ms": found.median_ms,
                "p10_ms": found.p10_ms,
                "p90_ms": found.p90_ms,
                "num_blocks": len(found.blocks_ms),
                "measured": speedup,
                "interval": (low, high),
                "predicted": predict_ms(plans[0]) / predict_ms(plan),
            }
        )
    return {
        "engine": engine,
        "device": name_device(torch.device(arguments.device)),
        "runtime": builder.runtime,
        "versions": read_versions() | read_engine_versions(engine),
        "num_threads": torch.get_num_threads(),
        "build_seconds": built_s,
        "seconds": time.monotonic() - began,
        "overhead_ms": costs.overhead_ms,
        "cost_ms": dict(costs.cost_ms),
        "depths_ms": [[depth.plan.depth, found.median_ms] for depth, found in zip(depths, timings, strict=False)],
        "num_left_out": len(plans) - len(rows),
        "worst_difference": max(abs(row["predicted"] - row["measured"]) for row in rows[1:]),
        "rows": [rows[0], *sorted(rows[1:], key=lambda row: -row["depth"])],
    }


def print_rows(engine: dict[str, Any]) -> None:
    """Print a row for each plan of an engine, the copy of the unmodified model first."""
    columns = ("depth", "dropped", "ms", "p10", "p90", "blocks", "measured", "predicted", "differ")
    print(f"{'engine':<14}" + "".join(f"{column:>10}" for column in columns) + f"{'95 % interval':>18}")
    for row in engine["rows"]:
        cells = [f"{row['depth']:g}", str(row["num_dropped"])]
        cells += [f"{row[name]:.3f}" for name in ("median_ms", "p10_ms", "p90_ms")]
        cells += [str(row["num_blocks"]), f"{row['measured']:.3f}", f"{row['predicted']:.3f}"]
        cells.append(f"{row['predicted'] - row['measured']:+.3f}")
        interval = "{:.3f} to {:.3f}".format(*row["interval"])
        print(f"{engine['engine']:<14}" + "".join(f"{cell:>10}" for cell in cells) + f"{interval:>18}")
    noise, worst = abs(engine["rows"][0]["measured"] - 1), engine["worst_difference"]
    print(
        f"{engine['engine']:<14}differs by at most {worst:.3f} (the copy by {noise:.3f}): the bar of {BAR} is "
        f"{'met' if worst <= BAR else 'not met'}; {engine['num_left_out']} plans left out\n"
        f"{'':<14}{engine['device']}; built in {engine['build_seconds']:.0f} s, done in {engine['seconds']:.0f} s\n",
        flush=True,
    )


def run_alone(engine: Engine, arguments: argparse.Namespace) -> None:
    """Measure one engine in this process; print a JSON object of what was measured, or why not."""
    try:
        with count_processor_time() if arguments.clock == "cpu" else nullcontext():
            found = measure_engine(engine, build_config(arguments), arguments)
    except LpsearchError as error:
        found = {"left_out": str(error)}
    print(json.dumps(found))


def run_apart(engine: str, words: Sequence[str], *, limit_s: float) -> dict[str, Any]:
    """Measure one engine in a process of its own; return the same, however the process ended."""
    command = [sys.executable, __file__, *words, "--engines", engine, "--alone"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            stdout = process.communicate(timeout=limit_s)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # so that files of engines go
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
            return {"left_out": f"it did not end within {limit_s:g} s"}
    if process.returncode:
        return {"left_out": f"it ended with exit code {process.returncode}; stderr says why"}
    found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every engine that runs here; print the table, and the same as JSON on the last line."""
    arguments = parse_arguments()
    engines = arguments.engines.split(",")
    for engine in engines:
        if engine not in ENGINES:
            raise SystemExit(f"--engines {engine}: expected some of {', '.join(ENGINES)}")
    if arguments.alone:
        run_alone(engines[0], arguments)
        return
    config = build_config(arguments)
    print(
        f"\n{arguments.model or arguments.shape}, {config.num_hidden_layers} layers, {arguments.dtype}, batch "
        f"{arguments.batch}, {arguments.context} cached tokens, {arguments.clock} time, on {arguments.device}, torch "
        f"{torch.__version__}\n",
        flush=True,
    )
    measured: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for engine in engines:
        print(f"measuring {engine}", file=sys.stderr, flush=True)
        found = run_apart(engine, sys.argv[1:], limit_s=arguments.limit)
        if "left_out" in found:
            left_out[engine] = found["left_out"]
            print(f"left out: {engine}: {left_out[engine]}\n", flush=True)
        else:
            measured.append(found)
            print_rows(found)
    print(json.dumps({"arguments": vars(arguments), "engines": measured, "left_out": left_out}))


if __name__ == "__main__":
    main()
