"""Time a tiny model and two plans in vLLM, in this process, and write down what was timed.

    python -m tests.vllm.time_plans RESULT.json

vLLM keeps much state for each process, so that the test runs this in a process of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lpsearch.latency.engines import check_engine
from lpsearch.latency.engines.vllm_offline import VllmSteps
from lpsearch.latency.mix import Workload
from lpsearch.models.traits import read_traits
from lpsearch.plan import Plan
from tests.tiny_models import build_tiny_config

PLANS = {
    "unmodified": Plan.baseline(4),
    "joined": Plan.from_groups([[0, 1, 2], [3]]),
    "dropping": Plan.from_groups([[0], [1, 2], [3]]).drop({"attention": [0, 3], "mlp": [1]}),
}


def main(result_file: Path) -> None:
    """Time decode steps and prompts of every plan; write the calls' times and the heads of the attentions."""
    device = torch.device("cpu")
    # vLLM attends on CPUs with heads of at least 32.
    traits = read_traits(build_tiny_config("llama", num_layers=4, hidden_size=128, head_dim=32))
    found: dict[str, Any] = {}
    for workload in (Workload("decode", 2, 24), Workload("prefill", 1, 24)):
        check_engine("vllm", traits, device=device, workloads=[workload])
        steps = VllmSteps(traits, workload, device=device, dtype=torch.float32)
        steps.reserve(4)
        built = {name: steps.build(plan, range(4)) for name, plan in PLANS.items()}
        times = {name: [step.run() for _ in range(2)] for name, step in built.items()}  # all of them live side by side
        heads = [engine.collective_rpc(_list_kv_heads)[0] for engine in steps._engines]
        found[workload.kind] = {"times": times, "num_kv_heads": dict(zip(built, heads, strict=True))}
        steps.close()
    result_file.write_text(json.dumps(found), encoding="utf-8")


def _list_kv_heads(worker: Any) -> list[int]:
    """Return, in a worker, the key-value heads of every attention that its cache was made for."""
    from vllm.model_executor.layers.attention import Attention

    return [module.num_kv_heads for module in worker.get_model().modules() if isinstance(module, Attention)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
