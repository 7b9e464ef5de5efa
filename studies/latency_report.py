"""Measure the latency of plans on one and several GPUs, and how well times add up.

    python studies/latency_report.py --part bars --tp 2
    python studies/latency_report.py --part table --model llama3.1-8b --tp 1
    python studies/latency_report.py --part additive,additive-drops --tp 2
    python studies/latency_report.py --part drops --tp 2
    python studies/latency_report.py --part plan --joins 6,14,26 --drop-attention 7,15 --drop-mlp 13
    python studies/latency_report.py --part emulate --tp 2
    python studies/latency_report.py --part auto

``bars`` measures 7 and 13 pairs, ``drops`` dropped attentions and MLPs beside them, ``plan`` the plan of the options,
``table`` several workloads and depths, ``additive`` the error of the latency model on random plans, ``additive-drops``
the same where these also drop branches, ``emulate`` the error of ``--emulate-tp``, and ``auto`` the time that
``optimize --latency auto`` takes.

Weights are random, by shape. Each part prints a table; the last line is one JSON object. ``--model`` may be a directory
with the config.json of a tiny model, which runs on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from lpsearch.latency.allow import DROPS, JOINS
from lpsearch.latency.measure import measure_profile
from lpsearch.latency.model import LatencyModel
from lpsearch.latency.ranks.parallel import EmulatedRanks
from lpsearch.latency.ranks.processes import run_ranks
from lpsearch.latency.ranks.symmetric import choose_ranks, measure_all_reduce_ms
from lpsearch.latency.runtime.decoder import default_mode
from lpsearch.latency.runtime.shaped import ShapedDecoders
from lpsearch.latency.sums import OneRank, Ranks
from lpsearch.latency.timing import bootstrap_ratio, measure_interleaved
from lpsearch.models import load_geometry
from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan

WORKLOADS = [
    ("decode", 1, 1024), ("decode", 1, 4096), ("decode", 16, 1024), ("decode", 64, 1024), ("prefill", 1, 2048),
]  # fmt: skip


def grouped(num_layers: int, num_groups: int, size: int = 2) -> Plan:
    """Return a plan of so many groups of a size before the last layer."""
    first = max(0, num_layers - 1 - size * num_groups)
    starts = range(first, first + size * num_groups, size)
    singles = [[i] for i in range(first)] + [list(range(i, i + size)) for i in starts]
    return Plan.from_groups(singles + [[i] for i in range(first + size * num_groups, num_layers)])


def plans_of(num_layers: int) -> dict[str, Plan]:
    """Return plans of pairs for 0, 10, 20 and 40 % less depth, and plans of groups of 3 and 4 for 20 %."""
    fifth = round(0.2 * num_layers)
    return {
        "0 %": Plan.baseline(num_layers),
        "10 %": grouped(num_layers, round(0.1 * num_layers)),
        "20 %": grouped(num_layers, fifth),
        "40 %": grouped(num_layers, round(0.4 * num_layers)),
        "20 %, threes": grouped(num_layers, round(fifth / 2), 3),
        "20 %, fours": grouped(num_layers, round(fifth / 3), 4),
    }


def get_device() -> torch.device:
    """Return the GPU of this rank, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def get_ranks(group: Any, num_elements: int) -> tuple[Ranks, dict[str, float]]:
    """Return the ranks of a process group with their fastest all-reduce, or the single rank without a group."""
    return (OneRank(), {}) if group is None else choose_ranks(group, num_elements=num_elements)


def time_plans(shaped: Any, plans: Any, kind: str, tokens: int, modes: Any, budget_s: float) -> dict[str, Any]:
    """Time plans in several modes, interleaved; return times in ms and ratios by plan and mode."""
    steps, num_bytes, fused = {}, {}, {}
    for mode in modes:
        for name, plan in plans.items() if mode == modes[0] else [("0 %", plans["0 %"])]:
            decoder = shaped.build(plan, length=tokens if kind == "decode" else 0, mode=mode)
            steps[name, mode] = decoder.run_step
            if kind == "prefill":
                steps[name, mode] = shaped.build_prefill(decoder, num_tokens=tokens)
            elif mode != "eager":
                decoder.capture_fastest()
            fused[name, mode] = decoder.fused_attention
            num_bytes[name, mode] = decoder.count_step_bytes()
    timings = measure_interleaved(list(steps.values()), device=shaped.device, ranks=shaped.ranks, budget_s=budget_s)
    found = dict(zip(steps, timings, strict=True))
    rows = {}
    for (name, mode), timing in found.items():
        _, low, high = bootstrap_ratio(found["0 %", mode], timing)
        rows[f"{name} {mode}"] = {
            "ms": timing.median_ms, "p10": timing.p10_ms, "p90": timing.p90_ms,
            "speedup": {other: found["0 %", other].median_ms / timing.median_ms for other in modes},
            "interval": [low, high], "blocks": len(timing.blocks_ms),
            "fused_attention": fused[name, mode],
            "gb_per_s": num_bytes[name, mode] / timing.median_ms / 1e6 if kind == "decode" else None,
        }  # fmt: skip
    return rows


@torch.inference_mode()
def run_part(group: Any, part: str, model: str, seconds: float, given: Plan) -> dict[str, Any]:
    """Run one part of the report on this rank; ``given`` is the plan of the part ``plan``."""
    device = get_device()
    config = load_geometry(model)
    traits = read_traits(config)
    mode = default_mode(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    num_layers = traits.num_layers
    ranks, sums = get_ranks(group, traits.hidden_size)
    result: dict[str, Any] = {"model": model, "tp": ranks.num_ranks, "all_reduce": ranks.kind, "all_reduce_us": sums}

    def shape(batch: int, capacity: int, own: Ranks) -> ShapedDecoders:
        return ShapedDecoders(traits, batch_size=batch, capacity=capacity, device=device, dtype=dtype, ranks=own)

    modes = ("compiled", "graph", "eager") if mode == "compiled" else ("eager",)
    context = min(1024, config.max_position_embeddings - 2)
    if part == "plan":
        plans = {"0 %": Plan.baseline(num_layers), "plan": given}
        result["rows"] = time_plans(shape(1, context + 1, ranks), plans, "decode", context, modes, seconds)
    elif part in ("bars", "drops"):
        plans = {"0 %": Plan.baseline(num_layers)} | {f"{n} pairs": grouped(num_layers, n) for n in (7, 13)}
        if part == "drops":
            chosen = range(1, num_layers, 4)
            for name, dropped in (("attentions", {"attention": chosen}), ("MLPs", {"mlp": chosen})):
                plans[f"{len(chosen)} {name} dropped"] = plans["0 %"].drop(dropped)
                plans[f"7 pairs, {len(chosen)} {name} dropped"] = plans["7 pairs"].drop(dropped)
        result["rows"] = time_plans(shape(1, context + 1, ranks), plans, "decode", context, modes, seconds)
    elif part == "table":
        result["rows"] = {}
        for kind, batch, tokens in WORKLOADS:
            if tokens >= config.max_position_embeddings + (kind == "prefill"):
                continue
            ranks, _ = get_ranks(group, traits.hidden_size * batch * (1 if kind == "decode" else tokens))
            plans = plans_of(num_layers)
            if (kind, batch, tokens) != WORKLOADS[0]:
                plans = {name: plan for name, plan in plans.items() if "," not in name}
            shaped = shape(batch, tokens + 1, ranks)
            rows = time_plans(shaped, plans, kind, tokens, modes, seconds)
            result["rows"] |= {
                f"{kind} b{batch} t{tokens} {name}": {**row, "all_reduce": ranks.kind} for name, row in rows.items()
            }
            del shaped
            if device.type == "cuda":
                torch.cuda.empty_cache()
    elif part in ("additive", "additive-drops"):
        drops = part == "additive-drops"
        profile = measure_profile(
            config, device=device, dtype=dtype, context_len=context, max_group=3, budget_s=seconds,
            allow=JOINS | DROPS if drops else JOINS,
            choose_ranks=None if group is None else lambda n: choose_ranks(group, num_elements=n),
        )  # fmt: skip
        rng = np.random.default_rng(0)
        plans = {}
        while len(plans) < 10:
            joins = [i for i in range(num_layers - 1) if rng.random() < rng.uniform(0.1, 0.6)]
            plan = Plan.from_joins(num_layers, joins)
            if max(len(g) for g in plan.groups) <= 3:
                if drops:
                    shares = {"attention": rng.uniform(0, 0.4), "mlp": rng.uniform(0, 0.3)}
                    plan = plan.drop(
                        {branch: np.flatnonzero(rng.random(num_layers) < p).tolist() for branch, p in shares.items()}
                    )
                plans[str(len(plans))] = plan
        shaped = shape(1, context + 1, ranks)
        decoders = [shaped.build(plan, length=context, mode=mode) for plan in plans.values()]
        for decoder in decoders:
            if mode != "eager":
                decoder.capture_fastest()
        timings = measure_interleaved([d.run_step for d in decoders], device=device, ranks=ranks, budget_s=seconds / 2)
        estimates = [LatencyModel(profile).estimate_latency_ms(plan) for plan in plans.values()]
        errors = [e / t.median_ms - 1 for e, t in zip(estimates, timings, strict=True)]
        result |= {"depths": [p.depth for p in plans.values()], "measured": [t.median_ms for t in timings]}
        result |= {
            "estimated": estimates,
            "mean_error": float(np.mean(np.abs(errors))),
            "worst": float(np.max(np.abs(errors))),
        }
        result["profile"] = profile.model_dump(mode="json")
    elif part == "auto":  # what `optimize --latency auto` measures before it searches
        began = time.perf_counter()
        profile = measure_profile(config, device=device, dtype=dtype)
        result |= {"measured_s": time.perf_counter() - began, "check_error": profile.workloads[0].check_error}
    elif part == "emulate":
        plans = {
            "0 %": Plan.baseline(num_layers),
            "7 pairs": grouped(num_layers, 7),
            "13 pairs": grouped(num_layers, 13),
        }
        sum_ms = measure_all_reduce_ms(ranks, num_elements=traits.hidden_size)
        alone = EmulatedRanks(ranks.num_ranks)
        real = time_plans(shape(1, context + 1, ranks), plans, "decode", context, (mode,), seconds)
        shard = time_plans(shape(1, context + 1, alone), plans, "decode", context, (mode,), seconds)
        result["sum_us"] = 1e3 * sum_ms
        result["rows"] = {
            name: {
                "real": real[f"{name} {mode}"]["ms"],
                "shard": shard[f"{name} {mode}"]["ms"],
                "estimate": shard[f"{name} {mode}"]["ms"] + 2 * plan.depth * sum_ms,
            }
            for name, plan in plans.items()
        }
        for row in result["rows"].values():
            row["error"] = row["estimate"] / row["real"] - 1
    return result


def main() -> None:
    """Run the parts on one or several ranks; print them, and the same as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part",
        required=True,
        help="comma-separated: bars, drops, plan, table, additive, additive-drops, emulate, auto",
    )
    for name in ("joins", "drop-attention", "drop-mlp"):
        parser.add_argument(f"--{name}", default="", help="layers of the part plan, e.g. 4,7,17")
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long each set of plans is timed")
    arguments = parser.parse_args()
    joins, attention, mlp = (
        tuple(int(i) for i in text.split(",") if i)
        for text in (arguments.joins, arguments.drop_attention, arguments.drop_mlp)
    )
    num_layers = read_traits(load_geometry(arguments.model)).num_layers
    plan = Plan.from_joins(num_layers, joins).drop({"attention": attention, "mlp": mlp})
    if (plan == Plan.baseline(num_layers)) == ("plan" in arguments.part.split(",")):
        parser.error("--part plan and its --joins, --drop-attention and --drop-mlp need each other")
    results = []
    for part in arguments.part.split(","):
        options = (part, arguments.model, arguments.seconds, plan)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if arguments.tp == 1:
            found = run_part(None, *options)
        else:
            found = run_ranks(run_part, num_ranks=arguments.tp, backend=backend, arguments=options)
        results.append(found)
        print(
            part, arguments.model, "tp", arguments.tp, {k: v for k, v in found.items() if k not in ("rows", "profile")}
        )
        for name, row in found.get("rows", {}).items():
            print(f"  {name:40}", {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
