"""Predicted and measured speed-up of plans in each engine: does the additive latency model hold there?

For each engine the script measures a profile as ``lpsearch profile --engine`` does, draws plans that it was not fitted
to, times them and the unmodified model in turns, and compares the speed-ups. Weights are random, so nothing is
downloaded. Engines that are not installed or do not run on the device are named and left out.

On a machine that others use, wall times say more of them than of the engine. ``--clock cpu`` counts the processor time
of this process instead, which on one thread is the wall time of an idle machine. Of llama.cpp, whose own clock is the
wall's, it then takes a whole call, in which the last token of the prompt is one more step.

    python studies/engine_times.py                                                   # what runs on this CPU
    python studies/engine_times.py --engines transformers --device cpu --seconds 60  # one of them, for longer
    OMP_NUM_THREADS=1 python studies/engine_times.py --clock cpu                     # beside other work
    python studies/engine_times.py --model llama3.2-1b --layers 16 --device cuda --dtype bfloat16 --context 1024
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import patch

import torch
from transformers import LlamaConfig, PretrainedConfig

from lpsearch.errors import LpsearchError
from lpsearch.latency import timing
from lpsearch.latency.engines import build_engine_steps, check_engine, generate, llama_cpp, vllm_offline
from lpsearch.latency.measure import measure_profile, name_device
from lpsearch.latency.model import LatencyModel
from lpsearch.latency.profile import Engine
from lpsearch.latency.runtime.steps import RuntimeSteps
from lpsearch.latency.sums import OneRank
from lpsearch.latency.timing import MIN_BLOCKS, bootstrap_ratio, measure_interleaved
from lpsearch.latency.workload import StepBuilder, Workload
from lpsearch.models import load_geometry
from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan

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
    parser.add_argument("--seconds", type=float, default=30.0, help="for the profile, and again for the plans")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--seed", type=int, default=0)
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


def measure_engine(engine: Engine, config: PretrainedConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a profile of an engine, then plans that it was not fitted to."""
    traits, device = read_traits(config), torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    workload = Workload("decode", arguments.batch, arguments.context)
    if engine != "runtime":
        check_engine(engine, traits, device=device, workloads=[workload])
    profile = measure_profile(
        config,
        device=device,
        dtype=dtype,
        engine=engine,
        workloads=[workload],
        budget_s=arguments.seconds,
        allow={"joins", "drop-attention", "drop-mlp"} if arguments.drops else {"joins"},
    )
    model = LatencyModel(profile)
    plans = [
        Plan.baseline(traits.num_layers),
        *draw_plans(traits.num_layers, count=arguments.plans, drops=arguments.drops, seed=arguments.seed),
    ]
    builder: StepBuilder
    if engine == "runtime":
        builder = RuntimeSteps(traits, workload, device=device, dtype=dtype, ranks=OneRank())
    else:
        builder = build_engine_steps(engine, traits, workload, device=device, dtype=dtype)
    rows = []
    try:
        with torch.inference_mode():
            builder.reserve(traits.num_layers)
            steps = [builder.build(plan, range(traits.num_layers), builder.modes[0]) for plan in plans]
            timings = measure_interleaved(
                [step.run for step in steps],
                device=device,
                budget_s=arguments.seconds,
                min_blocks=MIN_BLOCKS,
                are_clocked=steps[0].is_clocked,
            )
        for plan, found in zip(plans, timings, strict=True):
            speedup, low, high = bootstrap_ratio(timings[0], found)
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
                    "predicted": model.estimate_speedup(plan),
                }
            )
    finally:
        builder.close()
    return {
        "engine": engine,
        "runtime": profile.runtime,
        "versions": profile.versions,
        "num_threads": profile.num_threads,
        "mean_error": model.mean_error,
        "worst_difference": max(abs(row["predicted"] - row["measured"]) for row in rows[1:]),
        "rows": rows,
    }


def print_rows(engine: dict[str, Any]) -> None:
    """Print a row for each plan of an engine, the unmodified model first."""
    columns = ("depth", "dropped", "ms", "p10", "p90", "blocks", "measured", "predicted", "differ")
    print(f"{'engine':<14}" + "".join(f"{column:>10}" for column in columns) + f"{'95 % interval':>18}")
    for row in engine["rows"]:
        cells = [f"{row['depth']:g}", str(row["num_dropped"])]
        cells += [f"{row[name]:.3f}" for name in ("median_ms", "p10_ms", "p90_ms")]
        cells += [str(row["num_blocks"]), f"{row['measured']:.3f}", f"{row['predicted']:.3f}"]
        cells.append(f"{row['predicted'] - row['measured']:+.3f}")
        interval = "{:.3f} to {:.3f}".format(*row["interval"])
        print(f"{engine['engine']:<14}" + "".join(f"{cell:>10}" for cell in cells) + f"{interval:>18}")
    met = "met" if engine["worst_difference"] <= BAR else "not met"
    worst = engine["worst_difference"]
    print(f"{engine['engine']:<14}differs by at most {worst:.3f}: the bar of {BAR} is {met}\n", flush=True)


def main() -> None:
    """Measure every engine that runs here; print the table, and the same as JSON on the last line."""
    arguments = parse_arguments()
    config = build_config(arguments)
    device = name_device(torch.device(arguments.device))
    print(
        f"\n{arguments.model or arguments.shape}, {config.num_hidden_layers} layers, {arguments.dtype}, batch "
        f"{arguments.batch}, {arguments.context} cached tokens, {arguments.clock} time, on {device}, torch "
        f"{torch.__version__}\n"
    )
    found: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for engine in arguments.engines.split(","):
        if engine not in ENGINES:
            raise SystemExit(f"--engines {engine}: expected some of {', '.join(ENGINES)}")
        print(f"measuring {engine}", file=sys.stderr, flush=True)
        try:
            with count_processor_time() if arguments.clock == "cpu" else nullcontext():
                found.append(measure_engine(engine, config, arguments))
        except LpsearchError as error:
            left_out[engine] = str(error)
        else:
            print_rows(found[-1])
    for engine, reason in left_out.items():
        print(f"left out: {engine}: {reason}")
    print(json.dumps({"device": device, "arguments": vars(arguments), "engines": found, "left_out": left_out}))


if __name__ == "__main__":
    main()
