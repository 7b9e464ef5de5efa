"""What fused layers gain under transformers' own ``generate``: a table of time per token at several depths.

Random weights by shape, batch 1, a static cache and the compilation that ``generate`` then does by itself on a CUDA
device. The unmodified model and the fused ones take turns, so that a drift of the device's clocks meets all alike; a
ratio is of two runs of the same round. Nothing is downloaded.

    python studies/export_generate.py --model llama3.2-1b
    python studies/export_generate.py --device cpu --layers 4 --hidden 64 --new-tokens 8 --rounds 3 --joins 0,1,2
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from lpsearch.models import load_geometry
from lpsearch.plan import Plan
from lpsearch.transform import fuse_plan


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3.2-1b", help="alias whose geometry is bundled")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--joins", default="0,1,2,3,4,5,6", help="joined pairs of each fused model; 0 fuses nothing")
    parser.add_argument("--group", type=int, default=2, help="layers in a group; a plan has joins / (group - 1) groups")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, help="another number of layers, to try the script")
    parser.add_argument("--hidden", type=int, help="another hidden size, to try the script")
    return parser.parse_args()


def build_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """Build the unmodified model with random weights, straight on the device."""
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
    model.generation_config.eos_token_id = None  # every run makes the same number of tokens
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def build_plan(num_layers: int, num_joins: int, group: int) -> Plan:
    """Join groups of equal size, as many as give so many joins, around the middle of the model."""
    num_groups, rest = divmod(num_joins, group - 1)
    if rest or num_groups * group > num_layers:
        raise SystemExit(f"{num_joins} joins cannot be made of whole groups of {group} of {num_layers} layers")
    start = (num_layers - num_groups * group) // 2
    joins = [start + g * group + i for g in range(num_groups) for i in range(group - 1)]
    return Plan.from_joins(num_layers, joins)


def measure_ms_per_token(model: PreTrainedModel, input_ids: torch.Tensor, num_tokens: int) -> float:
    """Time one ``generate``, the prompt included, divided by the tokens made."""
    synchronize = torch.cuda.synchronize if input_ids.is_cuda else (lambda: None)
    synchronize()
    started = time.perf_counter()
    output: Any = model.generate(  # type: ignore[operator]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        cache_implementation="static",
    )
    synchronize()
    elapsed_s = time.perf_counter() - started
    assert output.shape[1] == input_ids.shape[1] + num_tokens
    return 1e3 * elapsed_s / num_tokens


def main() -> None:
    """Measure, print the table, and the same as JSON on the last line."""
    arguments = parse_arguments()
    torch._dynamo.config.cache_size_limit = 256  # each model compiles the same functions anew
    base = build_model(arguments)
    num_layers = base.config.num_hidden_layers
    models = {"unmodified": base}
    for num_joins in map(int, arguments.joins.split(",")):
        plan = build_plan(num_layers, num_joins, arguments.group)
        models[f"{num_joins} joins"] = fuse_plan(copy.deepcopy(base), plan)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(base.config.vocab_size, (1, arguments.prompt_tokens), generator=generator)
    input_ids = input_ids.to(arguments.device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        for _ in range(3):  # compiles, then records the graphs
            warm_ms = measure_ms_per_token(model, input_ids, arguments.new_tokens)
        print(f"warmed up {name}: {warm_ms:.3f} ms/token", flush=True)
    for _ in range(arguments.rounds):
        for name, model in models.items():
            times[name].append(measure_ms_per_token(model, input_ids, arguments.new_tokens))
    device = torch.cuda.get_device_name(0) if arguments.device.startswith("cuda") else "cpu"
    print(
        f"\n{arguments.model}, {num_layers} layers, {arguments.dtype}, batch 1, {arguments.prompt_tokens} + "
        f"{arguments.new_tokens} tokens, {arguments.rounds} rounds, static cache, groups of {arguments.group}, on "
        f"{device}, torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    columns = ("depth", "less", "ms/token", "p10", "p90", "speed-up", "p10", "p90")
    print(f"{'model':<12}" + "".join(f"{column:>10}" for column in columns))
    rows = []
    for name, model in models.items():
        depth = model.config.num_hidden_layers
        ratios = [b / t for b, t in zip(times["unmodified"], times[name], strict=True)]
        row: dict[str, Any] = {
            "model": name,
            "depth": depth,
            "depth_reduction": 1 - depth / num_layers,
            "ms_per_token": statistics.median(times[name]),
            "ms_per_token_p10_p90": find_p10_p90(times[name]),
            "speedup": statistics.median(ratios),
            "speedup_p10_p90": find_p10_p90(ratios),
        }
        cells = [f"{depth}", f"{row['depth_reduction']:.1%}", f"{row['ms_per_token']:.3f}"]
        cells += [f"{value:.3f}" for value in (*row["ms_per_token_p10_p90"], row["speedup"], *row["speedup_p10_p90"])]
        print(f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells))
        rows.append(row)
    print(json.dumps({"device": device, "torch": torch.__version__, "arguments": vars(arguments), "rows": rows}))


def find_p10_p90(values: list[float]) -> tuple[float, float]:
    """Return the 10th and 90th percentile."""
    ordered = sorted(values)
    return ordered[round(0.1 * (len(ordered) - 1))], ordered[round(0.9 * (len(ordered) - 1))]


if __name__ == "__main__":
    main()
