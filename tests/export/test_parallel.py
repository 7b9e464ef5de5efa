"""Exported directories under transformers' own tensor parallelism, on two ranks over gloo."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from lpsearch.export import export_checkpoint
from lpsearch.plan import Plan
from tests.fusing import DROPPING, MIXED, compute_planned_logits, relative_difference
from tests.tiny_models import FUSED_FAMILIES, build_tiny_model
from tests.tolerances import FLOAT32_FUSED
from tests.warm import WarmProcess

RANK = """
import json, sys
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
torch.set_num_threads(1)
SHOWN = (".layers.1.", "more_mlps", "mlps_ahead")
batch = {name: torch.tensor(rows) for name, rows in json.loads(sys.argv[1]).items()}
for directory in sys.argv[2:]:
    config = DistributedConfig(tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, distributed_config=config).eval()
    with torch.no_grad():
        logits = model(**batch).logits
        tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)
    shares = {
        name: parameter.to_local().numel() / parameter.numel()
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "to_local") and any(part in name for part in SHOWN)
    }
    if dist.get_rank() == 0:
        print(json.dumps({"logits": logits.tolist(), "tokens": tokens.tolist(), "shares": shares}), flush=True)
dist.destroy_process_group()
"""


def run_two_ranks(arguments: list[str]) -> list[str]:
    """Run the script in two processes, and return the lines of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        WarmProcess(*arguments, code=RANK, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.close()
    assert [process.returncode for process in processes] == [0, 0], answers[0][1] + answers[1][1]
    return answers[0][0].splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [MIXED, DROPPING["before the first attention and after another"]], ids=["joins", "drops"]
)
def test_two_ranks_together_are_one(plan: Plan, tmp_path: Path) -> None:
    from tests.tiny_models import build_left_padded_batch

    batch = build_left_padded_batch()
    tokens = batch["attention_mask"].bool()
    families = FUSED_FAMILIES
    models = {family: build_tiny_model(family) for family in families}
    for family, model in models.items():
        export_checkpoint(model, plan, tmp_path / family)
    encoded = json.dumps({name: tensor.tolist() for name, tensor in batch.items()})
    lines = run_two_ranks([encoded, *(str(tmp_path / family) for family in families)])
    answers = [json.loads(line) for line in lines if line.startswith("{")]
    for family, answer in zip(families, answers, strict=True):
        expected = compute_planned_logits(models[family], plan)
        logits = torch.tensor(answer["logits"])[tokens]
        assert relative_difference(logits, expected) < FLOAT32_FUSED, family
        assert answer["shares"], family
        further = {name: share for name, share in answer["shares"].items() if "mlps" in name and "norm" not in name}
        assert bool(further) == bool(plan.num_dropped), family
        assert all(share == 0.5 for name, share in further.items() if name.endswith("weight")), (family, further)
        linears = ("_proj", "c_fc", "query_key_value")
        assert any(share == 0.5 for name, share in answer["shares"].items() if any(part in name for part in linears)), (
            family
        )
