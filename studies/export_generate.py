"""Measure what fused layers gain under transformers' own ``generate``: the time per token at several depths.

The models have random weights by shape. Batch 1 and a static cache, with which ``generate`` compiles by itself on a
CUDA device. All models take turns, in a new random order each round, so that a drift of the device's clocks and the
model that ran before affect all alike. A time is the median over a run's tokens. The script also measures a copy of the
unmodified model: its ratio shows how much two compilations of one model differ. Nothing is downloaded.

    python studies/export_generate.py --model llama3.2-1b
    python studies/export_generate.py --device cpu --layers 4 --hidden 64 --new-tokens 8 --rounds 3 --joins 0,1,2
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from lpsearch.latency.timing import StepTiming, bootstrap_ratio
from lpsearch.models import load_geometry
from lpsearch.plan import Plan
from lpsearch.transform import fuse_plan


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3.2-1b", help="alias whose geometry is bundled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--joins", default="0,1,2,3,4,5,6", help="number of joins of each fused model; 0 fuses nothing")
    parser.add_argument("--group", type=int, default=2, help="layers in a group; a plan has joins / (group - 1) groups")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, help="another number of layers, to try the script")
    parser.add_argument("--hidden", type=int, help="another hidden size, to try the script")
    return parser.parse_args()


def build_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """Build the unmodified model with random weights on the device."""
    config: Any = load_geometry(arguments.model)
    if arguments.layers:
        config.num_hidden_layers = arguments.layers
    if arguments.hidden:
        config.hidden_size = arguments.hidden
        config.intermediate_size = 4 * arguments.hidden
        config.head_dim = arguments.hidden // config.num_attention_heads
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))
    model.generation_config.eos_token_id = None  # every run generates the same number of tokens
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def build_plan(num_layers: int, num_joins: int, group: int) -> Plan:
    """Return a plan with so many joins, in groups of equal size around the middle of the model."""
    num_groups, rest = divmod(num_joins, group - 1)
    if rest or num_groups * group > num_layers:
        raise SystemExit(f"{num_joins} joins cannot be made of whole groups of {group} of {num_layers} layers")
    start = (num_layers - num_groups * group) // 2
    joins = [start + g * group + i for g in range(num_groups) for i in range(group - 1)]
    return Plan.from_joins(num_layers, joins)


class TokenClock(BaseStreamer):
    """Records when each token arrives; ``generate`` waits for the device at every token in any case."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Record the arrival of a token on the host; the prompt comes first."""
        self.arrivals.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def measure_ms_per_token(model: PreTrainedModel, input_ids: torch.Tensor, num_tokens: int) -> float:
    """Return the median time between two tokens of one ``generate``, the prompt excluded."""
    clock = TokenClock()
    output: Any = model.generate(  # type: ignore[operator]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        cache_implementation="static",
        streamer=clock,
    )
    assert output.shape[1] == input_ids.shape[1] + num_tokens
    _prompt, *tokens = clock.arrivals
    return 1e3 * statistics.median(later - earlier for earlier, later in pairwise(tokens))


def main() -> None:
    """Measure all models; print the table, and the same as JSON on the last line."""
    arguments = parse_arguments()
    torch._dynamo.config.cache_size_limit = 256  # each model compiles the same functions anew
    base = build_model(arguments)
    num_layers = base.config.num_hidden_layers
    models = {"unmodified": base, "its copy": copy.deepcopy(base)}
    for num_joins in map(int, arguments.joins.split(",")):
        plan = build_plan(num_layers, num_joins, arguments.group)
        models[f"{num_joins} joins"] = fuse_plan(copy.deepcopy(base), plan)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(base.config.vocab_size, (1, arguments.prompt_tokens), generator=generator)
    input_ids = input_ids.to(arguments.device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        for _ in range(3):  # compiles, then captures the graphs
            warm_ms = measure_ms_per_token(model, input_ids, arguments.new_tokens)
        print(f"warmed up {name}: {warm_ms:.3f} ms/token", flush=True)
    order = random.Random(0)
    for _ in range(arguments.rounds):
        for name in order.sample(list(models), len(models)):
            times[name].append(measure_ms_per_token(models[name], input_ids, arguments.new_tokens))
    timings = {name: StepTiming(np.array(values)) for name, values in times.items()}
    device = torch.cuda.get_device_name(0) if arguments.device.startswith("cuda") else "cpu"
    print(
        f"\n{arguments.model}, {num_layers} layers, {arguments.dtype}, batch 1, {arguments.prompt_tokens} + "
        f"{arguments.new_tokens} tokens, {arguments.rounds} rounds, static cache, groups of {arguments.group}, on "
        f"{device}, torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    columns = ("depth", "less", "ms/token", "p10", "p90", "speed-up", "95 % interval")
    print(f"{'model':<12}" + "".join(f"{column:>10}" for column in columns[:-1]) + f"{columns[-1]:>16}")
    rows = []
    for name, timing in timings.items():
        depth = models[name].config.num_hidden_layers
        speedup, low, high = bootstrap_ratio(timings["unmodified"], timing)
        rows.append(
            {
                "model": name,
                "depth": depth,
                "depth_reduction": 1 - depth / num_layers,
                "ms_per_token": timing.median_ms,
                "ms_per_token_p10_p90": (timing.p10_ms, timing.p90_ms),
                "speedup": speedup,
                "speedup_interval": (low, high),
            }
        )
        cells = [f"{depth}", f"{1 - depth / num_layers:.1%}"]
        cells += [f"{value:.3f}" for value in (timing.median_ms, timing.p10_ms, timing.p90_ms, speedup)]
        print(f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells) + f"{f'{low:.3f} to {high:.3f}':>16}")
    print(json.dumps({"device": device, "torch": torch.__version__, "arguments": vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
