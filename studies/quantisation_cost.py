"""Estimate what 4-bit weights cost a packaged model, without the weights that they were made of.

    python studies/quantisation_cost.py --model smollm2-135m --data wikitext2 --windows 4 --seq-len 512 --seeds 3

Q4_1 rounds each weight to one of 16 levels between the smallest and the largest weight of its block of 32, so a weight
was within half a step of its level. For small errors the loss rises by a quadratic form of them. Rounding errors of the
same size, drawn uniformly within half a step and added to the quantised weights, therefore raise the loss in the mean
by as much again as the quantisation did; see Widrow and Kollar, "Quantization Noise" (2008), for that model. It
is an estimate: the true errors are not independent of the weights, and the loss is not quite quadratic. What is stored
in 8 bits is left as it is. Errors half as large say how far the loss is from quadratic.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys

import torch
from torch import Tensor, nn

from lpsearch.data import build_windows
from lpsearch.errors import LpsearchError, ModelError
from lpsearch.evaluation import ModelEvaluator
from lpsearch.models import get_decoder_layers, load_model, resolve_source
from lpsearch.models.aliases import name_model
from lpsearch.plan import Plan
from lpsearch.versions import read_versions

_BLOCK = 32
_LEVELS = 16
_SCALES = (1.0, 0.5)
"""Of the errors. Where the loss is quadratic in them, a rise divided by the square of its scale is one number."""


def find_steps(weight: Tensor) -> Tensor:
    """Return the step of each block of a dequantised Q4_1 matrix, ``(out, in / 32, 1)``.

    The smallest and the largest weight of a block are levels themselves.
    """
    blocks = weight.unflatten(-1, (-1, _BLOCK))
    return (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / (_LEVELS - 1)


def check_levels(weight: Tensor) -> None:
    """Refuse weights that are not on the levels of Q4_1.

    Raises:
        ModelError: if more than one in a thousand is further from a level than rounding to float32 explains.
    """
    blocks = weight.unflatten(-1, (-1, _BLOCK))
    steps = find_steps(weight).clamp(min=torch.finfo(weight.dtype).tiny)
    levels = (blocks - blocks.amin(-1, keepdim=True)) / steps
    share_off = ((levels - levels.round()).abs() > 0.02).double().mean()
    if share_off > 1e-3:
        raise ModelError(f"{share_off:.1%} of the weights are on no level of Q4_1; give a model of that type")


def add_rounding_errors(weight: Tensor, generator: torch.Generator, *, scale: float = 1.0) -> Tensor:
    """Return a matrix with errors added: uniform within half a step, as those of its quantisation, times ``scale``."""
    blocks = weight.unflatten(-1, (-1, _BLOCK))
    uniform = torch.rand(blocks.shape, generator=generator, dtype=weight.dtype) - 0.5
    return (blocks + scale * uniform * find_steps(weight)).flatten(-2)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Measure the loss of the model as it is, and with errors of as many seeds added."""
    loaded = load_model(resolve_source(arguments.model), device="cpu", dtype=torch.float32)
    windows = build_windows(
        arguments.data,
        tokenizer=loaded.tokenizer,
        num_windows=arguments.windows,
        seq_len=arguments.seq_len,
        model=loaded.model,
    )
    matrices = [
        module.weight
        for layer in get_decoder_layers(loaded.model)
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    ]
    originals = [weight.detach().clone() for weight in matrices]
    for weight in originals:
        check_levels(weight)

    def evaluate() -> float:
        plan = Plan.baseline(loaded.identity.num_layers)
        evaluator = ModelEvaluator(model=loaded.model, windows=windows, cache_bytes=0)
        losses = evaluator.evaluate_windows(plan, range(windows.num_windows))
        return statistics.fmean(losses.nll_nats_per_token)

    nll = evaluate()
    rises: dict[float, list[float]] = {scale: [] for scale in _SCALES}
    for seed, scale in itertools.product(range(arguments.seeds), _SCALES):
        generator = torch.Generator().manual_seed(seed)
        for weight, original in zip(matrices, originals, strict=True):
            weight.data.copy_(add_rounding_errors(original, generator, scale=scale))
        rises[scale].append(evaluate() - nll)
        print(f"seed {seed}, errors times {scale:g}: {rises[scale][-1]:+.4f} nats per token", file=sys.stderr)
    return {
        "model": name_model(loaded.identity.id),
        "data": windows.spec,
        "windows": windows.num_windows,
        "seq_len": windows.seq_len,
        "nll": nll,
        "perplexity": math.exp(nll),
        "cost_nats_per_token": {scale: statistics.fmean(found) / scale**2 for scale, found in rises.items()},
        "rises": rises,
        "versions": read_versions(),
    }


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a model whose layers are Q4_1")
    parser.add_argument("--data", default="wikitext2", help="text to measure the loss on")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the errors")
    try:
        print(json.dumps(measure(parser.parse_args())))
    except LpsearchError as error:
        print(f"quantisation_cost: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
