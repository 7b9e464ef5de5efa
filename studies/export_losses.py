"""Measure how far an exported directory's loss is from its plan's, in float32 and in bfloat16.

A plan file has the loss of a model whose groups still run layer by layer. The directory has fused layers, rounded once
to the dtype of the export. Each row is one of the two in one dtype, with its difference from the plan in float32 on the
same windows and the standard error of the difference over windows. The rows of the plan itself and of the unmodified
model show what a dtype does without any export. ``--data`` takes a file that ``windows_file.py`` wrote, or a text.

    python studies/export_losses.py --model smollm2-135m --plan plan.json --data valid.npz
    python studies/export_losses.py --model smollm2-135m --plan plan.json --data text.txt --windows 4 --seq-len 64
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lpsearch
from lpsearch.commands.loading import describe_device, resolve_device
from lpsearch.data import Windows
from lpsearch.errors import LpsearchError
from lpsearch.evaluation.losses import compute_paired_delta
from lpsearch.models import load_model, resolve_source
from studies.windows_file import get_windows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.inference_mode()
def compute_losses(model: Any, windows: Windows) -> list[float]:
    """Return the mean loss of each window in nats per token, with the softmax in float32."""
    losses = []
    for row in windows.input_ids:
        ids = torch.as_tensor(row, dtype=torch.long, device=model.device)[None]
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none").double().mean().item())
    return losses


def measure_losses(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the losses of each form by its name; the plan in float32 comes first."""
    plan = lpsearch.load_plan(options.plan)
    device = resolve_device(options.device)
    losses: dict[str, list[float]] = {}
    unmodified: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, dtype in DTYPES.items():
            loaded = load_model(resolve_source(options.model), device=device, dtype=dtype)
            windows = get_windows(options.data, loaded, num_windows=options.windows, seq_len=options.seq_len)
            unmodified[f"unmodified {name}"] = compute_losses(loaded.model, windows)
            with lpsearch.applied_plan(loaded.model, plan):
                losses[f"plan {name}"] = compute_losses(loaded.model, windows)
            directory = lpsearch.export_checkpoint(loaded.model, plan, Path(scratch) / name)
            del loaded
            fused = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=True)
            losses[f"directory {name}"] = compute_losses(fused.to(device).eval(), windows)
    return losses | unmodified


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all forms; print the table, and the same as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="alias, hub id, directory or .gguf file")
    parser.add_argument("--plan", type=Path, required=True, help="plan file for the model")
    parser.add_argument("--data", required=True, help="windows file, or a text as for lpsearch optimize")
    parser.add_argument("--windows", type=int, help="number of windows to take, from the first")
    parser.add_argument("--seq-len", type=int, help="number of tokens of each window to take, from the first")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        losses = measure_losses(options)
    except LpsearchError as error:
        print(f"export_losses: {error}", file=sys.stderr)
        return error.exit_code
    device = describe_device(resolve_device(options.device))
    print(
        f"{options.model}, {options.plan}, {device}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"{'form':<22}{'nll':>10}{'less reference':>16}{'s.e.':>11}   reference")
    rows = []
    for name, values in losses.items():
        reference = "unmodified float32" if name.startswith("unmodified") else "plan float32"
        difference = compute_paired_delta(values, losses[reference])
        nll = sum(values) / len(values)
        rows.append(
            {"form": name, "nll": nll, "difference": difference.delta, "standard_error": difference.standard_error}
        )
        print(f"{name:<22}{nll:>10.5f}{difference.delta:>16.2e}{difference.standard_error or 0:>11.1e}   {reference}")
    print(json.dumps({"device": device, "windows": len(losses["plan float32"]), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
