"""Measure where a decode step's time goes: block sizes and bandwidth of the one-row product, and time by kernel.

    python studies/latency_kernels.py --model llama2-7b --tp 2 [--sweep] [--variants] [--profile]

The script needs CUDA devices. It prints tables; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F

from lpsearch.latency import kernels
from lpsearch.latency.architecture import Architecture, read_architecture
from lpsearch.latency.graphs import capture_graph
from lpsearch.latency.parallel import GroupRanks, OneRank, Ranks, run_ranks
from lpsearch.latency.shaped import ShapedDecoders
from lpsearch.latency.symmetric import SymmetricRanks, measure_all_reduce_ms
from lpsearch.latency.timing import bootstrap_ratio, measure_interleaved
from lpsearch.models import load_geometry
from lpsearch.plan import Plan

BLOCKS = [
    (1, 2048, 4), (1, 4096, 8), (2, 1024, 4), (2, 2048, 8), (4, 512, 4), (4, 1024, 4), (4, 1024, 8),
    (8, 512, 4), (8, 512, 8), (8, 1024, 8), (16, 256, 4), (16, 512, 8),
]  # fmt: skip


def pairs(num_layers: int, num_pairs: int) -> Plan:
    """Return a plan of so many pairs before the last layer."""
    first = num_layers - 1 - 2 * num_pairs
    joined = [[i, i + 1] for i in range(first, num_layers - 1, 2)]
    return Plan.from_groups([[i] for i in range(first)] + joined + [[num_layers - 1]])


def time_ms(run: Any, count: int) -> float:
    """Return the time of one of ``count`` calls inside a captured graph."""
    graph = capture_graph(run)
    (timing,) = measure_interleaved([graph.replay], device=torch.device("cuda"), budget_s=0.05, warm_up_s=0.02)
    return timing.median_ms / count


def sweep(architecture: Architecture, num_ranks: int, members: int) -> list[dict[str, Any]]:
    """Time every projection with every block size and with the library; the weights are larger than the L2 cache."""
    arch, rows = architecture, []
    heads, kv, inner = arch.num_heads // num_ranks, arch.num_kv_heads // num_ranks, arch.intermediate_size // num_ranks
    shapes = {
        "qkv": (members * (heads + 2 * kv) * arch.head_dim, arch.hidden_size, None),
        "o": (arch.hidden_size, members * heads * arch.head_dim, None),
        "gate_up": (members * inner, arch.hidden_size, "silu"),
        "down": (arch.hidden_size, members * inner, None),
    }
    for name, (num_out, num_in, activation) in shapes.items():
        matrix = (2 if activation else 1) * num_out * num_in
        copies = max(2, (1 << 29) // matrix)
        weights = torch.randn(copies, matrix // num_in, num_in, dtype=torch.bfloat16, device="cuda") * 0.02
        x = torch.randn(1, num_in, dtype=torch.bfloat16, device="cuda")
        eps = 1e-5 if name in ("qkv", "gate_up") else None

        def run(options: Any, activation: Any = activation, eps: Any = eps, x: Any = x, weights: Any = weights) -> None:
            for weight in weights:
                kernels.multiply_row(x, weight[None], norm_eps=eps, activation=activation, launch=options)

        def library(x: Any = x, weights: Any = weights) -> None:
            for weight in weights:
                F.linear(x, weight)

        times = {"library": time_ms(library, copies)}
        for block_out, block_in, num_warps in BLOCKS:
            options = {"BLOCK_OUT": block_out, "BLOCK_IN": block_in, "num_warps": num_warps}
            times[f"{block_out}x{block_in}/{num_warps}"] = time_ms(lambda o=options, r=run: r(o), copies)
        speed = {key: 2 * matrix / ms / 1e9 for key, ms in times.items()}
        ranked = sorted(speed.items(), key=lambda item: -item[1])
        print(f"{name} x{members} tp{num_ranks} {num_out}x{num_in}: " + ", ".join(f"{k} {v:.2f}" for k, v in ranked))
        rows.append({"name": name, "members": members, "num_ranks": num_ranks, "tb_per_s": speed})
        del weights
    return rows


def variants(group: Any, model: str, tokens: int, profile: bool, kinds: list[Any]) -> dict[str, Any]:
    """Time the unmodified model and plans of 7 and 13 pairs in every mode and with every all-reduce, on this rank."""
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = read_architecture(load_geometry(model))
    choices: dict[str, Ranks] = {"": OneRank()}
    if group is not None:
        choices = {"nccl": GroupRanks(group)}
        choices |= {kind: SymmetricRanks(group, kind) for kind in kinds if kind != "nccl"}
    first = next(iter(choices.values()))
    result: dict[str, Any] = {"tp": first.num_ranks, "all_reduce_us": {}}
    if group is not None:
        for kind, ranks in choices.items():
            result["all_reduce_us"][kind] = 1e3 * measure_all_reduce_ms(ranks, num_elements=architecture.hidden_size)
    shaped = ShapedDecoders(
        architecture, batch_size=1, capacity=tokens + 64, device=device, dtype=torch.bfloat16, ranks=first
    )
    plans = {0: Plan.baseline(architecture.num_layers)} | {n: pairs(architecture.num_layers, n) for n in (7, 13)}
    decoders = {}
    for kind, ranks in choices.items():
        for number, plan in plans.items():
            decoders[f"compiled {kind} {number}"] = shaped.build(plan, length=tokens, mode="compiled", ranks=ranks)
    for number, plan in plans.items():
        decoders[f"graph {number}"] = shaped.build(plan, length=tokens, mode="graph")
    for decoder in decoders.values():
        decoder.capture()
    timings = measure_interleaved(
        [decoder.run_step for decoder in decoders.values()], device=device, ranks=first, budget_s=3
    )
    found = dict(zip(decoders, timings, strict=True))
    for name, timing in found.items():
        base = found[name.rsplit(" ", 1)[0] + " 0"]
        ratio = bootstrap_ratio(base, timing)
        num_bytes = decoders[name].count_step_bytes()
        result[name] = [timing.median_ms, timing.p10_ms, timing.p90_ms, ratio[0], num_bytes / timing.median_ms / 1e9]
    if profile:
        result["kernels_us"] = profile_step(decoders[next(iter(decoders))], first)
        if group is not None:
            result["kernels_us_symmetric"] = profile_step(decoders[f"compiled {kinds[-1]} 0"], choices[kinds[-1]])
    return result


def profile_step(decoder: Any, ranks: Ranks) -> dict[str, Any]:
    """Return, for each kernel of a step, how often it runs and its total time in us."""
    from torch.profiler import ProfilerActivity

    ranks.barrier()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            decoder.run_step()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[event.name[:70]][0] += 0.2
            totals[event.name[:70]][1] += event.device_time / 5
    top = sorted(totals.items(), key=lambda item: -item[1][1])[:14]
    return {name: [round(count, 1), round(total, 1)] for name, (count, total) in top}


def main() -> None:
    """Run the chosen measurements; print them, and the same as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--kinds", default="nccl,one_shot,push")
    parser.add_argument("--context", type=int, default=1024)
    for flag in ("--sweep", "--variants", "--profile"):
        parser.add_argument(flag, action="store_true")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if arguments.sweep:
        architecture = read_architecture(load_geometry(arguments.model))
        with torch.inference_mode():
            cases = [(arguments.tp, 1), (arguments.tp, 2)]
            result["sweep"] = [row for case in cases for row in sweep(architecture, *case)]
    if arguments.variants:
        options = (arguments.model, arguments.context, arguments.profile, arguments.kinds.split(","))
        if arguments.tp == 1:
            result |= variants(None, *options)
        else:
            result |= run_ranks(variants, num_ranks=arguments.tp, backend="nccl", arguments=options)
        for key, value in result.items():
            print(key, json.dumps(value) if not isinstance(value, dict) else "")
            for name, entry in value.items() if isinstance(value, dict) else ():
                print("   ", name, entry)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
