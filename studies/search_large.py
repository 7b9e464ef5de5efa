"""Time a whole study of a model of billions of parameters: is the device busy, and what does the prefix cache save?

The weights are random, so the script needs only a geometry. Matrices keep the scale of their input and embeddings have
unit variance, which keeps hidden states finite and lets every layer move the logits. The tokens are random too, unless
a windows file is given. On random tokens a plan's nll is noise, so the study minimises KL(base || plan), which costs
one more head. With ``--metric nll`` the study searches the noise, and racing cannot stop any plan early.

``study_s`` runs from the first evaluation to the last tell. ``predicted_s`` is the time of the forwards alone: all
trials on all windows without a cache, at ``--peak-tflops``.

    python studies/search_large.py --model llama2-7b --trials 200 --windows 16 --seq-len 2048
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.commands.loading import describe_device, resolve_device
from lpsearch.data import Windows
from lpsearch.errors import ConfigError, LpsearchError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.models import get_decoder_layers, load_geometry
from lpsearch.plan import Plan
from lpsearch.search import PlanSpace, StudyStore, TrialUpdate, run_study
from lpsearch.search.results import Metric
from studies.windows_file import load_windows


def build_random_model(
    config: PretrainedConfig, *, device: torch.device, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """Build a model of random weights on its device.

    Matrices get variance 1 / inputs, embeddings variance 1; norms and biases keep their initial values.
    """
    build: Any = AutoModelForCausalLM.from_config
    with torch.device(device):
        model: PreTrainedModel = build(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter is embedding:
                parameter.normal_(generator=generator)
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return model.requires_grad_(False).eval()


def count_flops(model: PreTrainedModel, *, seq_len: int) -> tuple[float, float]:
    """Return the floating-point operations of one layer and of the head on one window.

    A multiplication with an addition counts as two operations. Attention counts the causal half of the products.
    """
    config = model.config.get_text_config()
    layers = get_decoder_layers(model)
    matrices = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1) / len(layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * seq_len * seq_len * config.num_attention_heads * head_dim
    return 2 * seq_len * matrices + attention, 2.0 * seq_len * config.vocab_size * config.hidden_size


class TimedEvaluator:
    """Evaluates plans, and records when it began and how long its evaluations took.

    Attributes:
        began_at: time of the first evaluation.
        busy_s: seconds spent evaluating.
        num_evaluated: windows evaluated, of all plans together.
    """

    def __init__(self, evaluator: ModelEvaluator) -> None:
        self._evaluator = evaluator
        self.began_at: float | None = None
        self.busy_s = 0.0
        self.num_evaluated = 0

    @property
    def num_windows(self) -> int:
        """The number of windows."""
        return self._evaluator.num_windows

    def evaluate_windows(self, plan: Plan, window_indices: Sequence[int]) -> WindowLosses:
        """Evaluate a plan; the device has finished when the losses are on the host."""
        began_at = time.monotonic()
        if self.began_at is None:
            self.began_at = began_at
        losses = self._evaluator.evaluate_windows(plan, window_indices)
        self.busy_s += time.monotonic() - began_at
        self.num_evaluated += len(window_indices)
        return losses


def measure_study(
    model: PreTrainedModel,
    windows: Windows,
    *,
    trials: int,
    max_group: int,
    metric: Metric,
    staged: bool,
    seed: int,
    peak_tflops: float,
) -> dict[str, Any]:
    """Run a study with its database, and report where the time went."""
    evaluator = ModelEvaluator(model=model, windows=windows, metric=metric)
    timed = TimedEvaluator(evaluator)
    told_at: list[float] = []

    def note_tell(update: TrialUpdate) -> None:
        told_at.append(time.monotonic())

    num_layers = len(get_decoder_layers(model))
    options: dict[str, Any] = {} if staged else {"staged": False}
    with tempfile.TemporaryDirectory(prefix="lpsearch-large-") as directory:
        store = StudyStore(f"sqlite:///{Path(directory) / 'study.db'}", study_name="large")
        with store:
            result = run_study(
                evaluator=timed,
                space=PlanSpace(num_layers, max_group),
                budget=trials,
                store=store,
                seed=seed,
                metric=metric,
                on_trial=note_tell,
                **options,
            )
    assert timed.began_at is not None
    study_s = told_at[-1] - timed.began_at
    usage = evaluator.cache_usage
    layer_flops, head_flops = count_flops(model, seq_len=windows.seq_len)
    heads = 2 if metric == "kl" else 1
    flops = layer_flops * usage.layers_run + heads * head_flops * timed.num_evaluated
    whole_flops = len(result.results) * windows.num_windows * (layer_flops * num_layers + heads * head_flops)
    return {
        "predicted_s": whole_flops / (1e12 * peak_tflops),
        "study_s": study_s,
        "evaluation_s": timed.busy_s,
        "trials": len(result.results),
        "tokens": timed.num_evaluated * windows.seq_len,
        "tokens_unstaged": len(result.results) * windows.num_windows * windows.seq_len,
        "layers_run": usage.layers_run,
        "layers_asked": usage.layers_asked,
        "cache_gib": usage.held_bytes / 2**30,
        "cache_budget_gib": usage.budget_bytes / 2**30,
        "tflops": flops / study_s / 1e12,
        "front": [[record.num_joins, record.get_cost(metric)] for record in result.front],
    }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b", help="alias, hub id or directory whose geometry is used")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--windows", type=int, default=16, help="number of windows of random tokens")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in each")
    parser.add_argument("--windows-file", type=Path, help="an .npz windows file instead of random tokens")
    parser.add_argument("--max-group", type=int, default=2)
    parser.add_argument("--metric", choices=["kl", "nll"], default="kl")
    parser.add_argument("--unstaged", action="store_true", help="evaluate every plan on all windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="peak rate of the device, for predicted_s")
    parser.add_argument("--device", default="auto", help="torch device")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Time a study, print the JSON line, and return the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        print(json.dumps(run(options)))
    except LpsearchError as error:
        print(f"search_large: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run a study, and report where the time went."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if min(options.trials, options.windows) < 1 or options.seq_len < 2 or options.peak_tflops <= 0:
        raise ConfigError("--trials, --windows and --peak-tflops must be positive, --seq-len at least 2")
    device = resolve_device(options.device)
    began_at = time.monotonic()
    config = load_geometry(options.model)
    model = build_random_model(config, device=device, dtype=getattr(torch, options.dtype), seed=options.seed)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    load_s = time.monotonic() - began_at
    if options.windows_file is not None:
        windows = load_windows(options.windows_file)
    else:
        shape = (options.windows, options.seq_len)
        vocab_size = config.get_text_config().vocab_size
        rng = np.random.default_rng(options.seed)
        windows = Windows(rng.integers(vocab_size, size=shape, dtype=np.int32), "uniformly random tokens")
    result = measure_study(
        model,
        windows,
        trials=options.trials,
        max_group=options.max_group,
        metric=options.metric,
        staged=not options.unstaged,
        seed=options.seed,
        peak_tflops=options.peak_tflops,
    )
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "model": options.model,
        "parameters": model.num_parameters(),
        "windows": windows.num_windows,
        "seq_len": windows.seq_len,
        "data": windows.spec,
        "metric": options.metric,
        "staged": not options.unstaged,
        "max_group": options.max_group,
        "seed": options.seed,
        "load_s": load_s,
        **result,
        "peak_memory_gib": None if peak_bytes is None else peak_bytes / 2**30,
        "dtype": options.dtype,
        "device": describe_device(device),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
