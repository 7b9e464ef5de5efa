"""Count the all-reduces of a step and their bytes by running ranks that share a model, and check what they compute.

For each ``--models`` shape a model with its layers, heads and key-value heads, but 8 numbers a head, is built with
random weights. So many ranks as ``--tp`` says share it over gloo on the CPU, for the unmodified model and for plans of
groups of 2, 3 and 4 layers. Each rank counts the sums of a prompt and of a decode step, and the logits of both are
compared with those of one rank. Bytes are those of the real hidden size in bfloat16. The last line is JSON.

    python studies/all_reduces.py --models llama2-7b,llama3.1-8b,llama2-13b,llama3.1-70b --tp 4,8
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.latency.ranks.parallel import ProcessGroupRanks
from lpsearch.latency.ranks.processes import run_ranks
from lpsearch.latency.runtime.decoder import build_decoder
from lpsearch.models import load_geometry
from lpsearch.plan import Plan
from lpsearch.versions import read_versions

HEAD_DIM = 8
PROMPT_LEN = 5
BYTES_PER_NUMBER = 2
BATCH_SIZES = (1, 16, 64)
PREFILL_LEN = 2048
LESS_DEPTH = (0.0, 0.2, 0.4)
GROUP_SIZES = (2, 3, 4)


class CountingRanks(ProcessGroupRanks):
    """Ranks that count their sums.

    Attributes:
        numbers: how many numbers each sum since the last :meth:`take` had.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.numbers: list[int] = []

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum over ranks, and count it."""
        self.numbers.append(partial.numel())
        return super().all_reduce(partial)

    def take(self) -> list[int]:
        """Return the sums since the last call, in their order."""
        numbers, self.numbers = self.numbers, []
        return numbers


@dataclass(frozen=True)
class Counted:
    """What one rank did.

    Attributes:
        prefill: numbers of each sum of the prompt.
        decode: numbers of each sum of a decode step.
        logits: (2, vocab) of the prompt's end and of the step after it.
    """

    prefill: list[int]
    decode: list[int]
    logits: NDArray[np.float32]


def list_plans(num_layers: int) -> dict[str, Plan]:
    """Return the unmodified model and plans of groups in the middle, by what they are."""
    plans = {"unmodified": Plan.baseline(num_layers)}
    for share in LESS_DEPTH[1:]:
        for size in GROUP_SIZES:
            num_groups = round(share * num_layers / (size - 1))
            if num_groups * size > num_layers:
                continue
            first = (num_layers - num_groups * size) // 2
            joins = [first + size * group + join for group in range(num_groups) for join in range(size - 1)]
            plans[f"{num_groups} groups of {size}"] = Plan.from_joins(num_layers, joins)
    return plans


def build_small(model: str) -> Any:
    """Build a model with the layers and heads of a shape, and few numbers a head."""
    config = copy.deepcopy(load_geometry(model))
    config.hidden_size = HEAD_DIM * config.num_attention_heads
    config.head_dim = HEAD_DIM
    config.intermediate_size = 2 * config.hidden_size
    config.vocab_size = 128
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def run_plan(model: Any, plan: Plan, ranks: CountingRanks | None) -> Counted:
    """Run a prompt and one step after it, on one rank where there are no others."""
    decoder = build_decoder(model, plan, batch_size=1, capacity=2 * PROMPT_LEN, ranks=ranks)
    first = decoder.prefill(torch.arange(3, 3 + PROMPT_LEN)[None])
    prefill = [] if ranks is None else ranks.take()
    logits = torch.cat([first, decoder.decode_logits()]).float()
    return Counted(prefill, [] if ranks is None else ranks.take(), logits.numpy())


def count_on_ranks(group: dist.ProcessGroup, model: str) -> dict[str, Counted]:
    """Run every plan on the ranks of a group, and count."""
    ranks, built = CountingRanks(group), build_small(model)
    return {name: run_plan(built, plan, ranks) for name, plan in list_plans(built.config.num_hidden_layers).items()}


def describe(model: str, num_ranks: int) -> list[dict[str, Any]]:
    """Count on so many ranks, compare with one, and return a row for each plan."""
    counted: dict[str, Counted] = run_ranks(count_on_ranks, num_ranks=num_ranks, backend="gloo", arguments=[model])
    built = build_small(model)
    small, hidden_size = built.config.hidden_size, load_geometry(model).hidden_size
    rows = []
    for name, plan in list_plans(built.config.num_hidden_layers).items():
        found = counted[name]
        # Every sum is of hidden states, as wide as the model.
        assert set(found.decode) == {small}
        assert set(found.prefill) == {small * PROMPT_LEN}
        expected = run_plan(built, plan, None)
        rows.append(
            {
                "model": model,
                "ranks": num_ranks,
                "plan": name,
                "depth": plan.depth,
                "sums": len(found.decode),
                "prefill_sums": len(found.prefill),
                "decode_kib": {
                    size: len(found.decode) * size * hidden_size * BYTES_PER_NUMBER / 1024 for size in BATCH_SIZES
                },
                "prefill_mib": len(found.prefill) * PREFILL_LEN * hidden_size * BYTES_PER_NUMBER / 2**20,
                "error": float(abs(found.logits - expected.logits).max()),
            }
        )
    return rows


def main() -> None:
    """Print a table, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama2-7b,llama3.1-8b,llama2-13b,llama3.1-70b")
    parser.add_argument("--tp", default="4,8", help="numbers of ranks")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(
        "| model | ranks | plan | depth | sums a step | KiB a step, batch 1 | 16 | 64 | MiB a prompt | logits off by |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model in arguments.models.split(","):
        for num_ranks in map(int, arguments.tp.split(",")):
            for row in describe(model, num_ranks):
                rows.append(row)
                kib = " | ".join(f"{kib:,.0f}" for kib in row["decode_kib"].values())
                print(
                    f"| {model} | {num_ranks} | {row['plan']} | {row['depth']:g} | {row['sums']} | {kib} | "
                    f"{row['prefill_mib']:,.0f} | {row['error']:.1e} |",
                    flush=True,
                )
    print(json.dumps({"versions": read_versions(), "rows": rows}))


if __name__ == "__main__":
    main()
