"""Compare what ``optimize --dry-run`` says with what a study then takes, on this machine.

The study is that of ``search_large.py``: random weights of the model's shape, random tokens, the divergence from the
unmodified model. So it needs a geometry and no weights. Ratios are measured over forecast; 0.8 to 1.2 is the aim.

    python studies/dry_run_check.py --model llama2-7b --device cuda
    python studies/dry_run_check.py --model smollm2-135m --budget 12 --windows 8 --seq-len 128 --dtype float32

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.commands.dry_run import forecast_study
from lpsearch.config import resolve_config
from lpsearch.errors import LpsearchError
from studies import search_large


def compare(forecast: dict[str, Any], measured: dict[str, Any], *, seq_len: int) -> dict[str, dict[str, float]]:
    """Return forecast, measurement and their ratio of what both know.

    ``seconds a layer-window`` leaves out how many windows racing spares, which depends on the losses.
    """
    proxy_tokens = measured["tokens"] / seq_len * (seq_len - 1)
    # Before the first plan the evaluator runs the unmodified model, which the plans are compared with; its own
    # evaluation then comes from the cache, so the study asks for it twice and runs it once.
    num_windows = measured["tokens_unstaged"] / seq_len / measured["trials"]
    share = measured["layers_run"] / (measured["layers_asked"] - num_windows * forecast["num_layers"])
    layers_expected = (
        forecast["tokens"]["proxy"] / (seq_len - 1) * forecast["num_layers"] * forecast["layers_run_share"]
    )
    pairs = {
        "tokens": (forecast["tokens"]["proxy"], proxy_tokens),
        "share of layers run": (forecast["layers_run_share"], share),
        "seconds of the search": (forecast["seconds"]["search"], measured["study_s"]),
        "seconds a layer-window": (
            forecast["seconds"]["search"] / layers_expected,
            measured["study_s"] / measured["layers_run"],
        ),
        "hidden states, GiB": (forecast["memory_bytes"]["hidden_states"] / 2**30, measured["cache_gib"]),
    }
    if measured["peak_memory_gib"] is not None:
        pairs["peak memory, GiB"] = (forecast["memory_bytes"]["total"] / 2**30, measured["peak_memory_gib"])
    return {
        name: {"forecast": expected, "measured": found, "ratio": found / expected}
        for name, (expected, found) in pairs.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Forecast, run the study, print the comparison, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama2-7b")
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--unstaged", action="store_true", help="evaluate every plan on all windows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    options = parser.parse_args(arguments)
    shared = {name: getattr(options, name) for name in ("model", "budget", "windows", "seq_len", "device", "dtype")}
    given = {**shared, "metric": "kl", "latency": "off", "staged": not options.unstaged}
    words = ["--model", options.model, "--trials", options.budget, "--windows", options.windows]
    words += ["--seq-len", options.seq_len, "--device", options.device, "--dtype", options.dtype]
    words += ["--unstaged"] * options.unstaged
    parsed = search_large.build_parser().parse_args(list(map(str, words)))
    try:
        forecast: dict[str, Any] = dict(forecast_study(resolve_config(command_line=given), hardware=None).document)
        measured = search_large.run(parsed)
    except LpsearchError as error:
        print(f"dry_run_check: {error}", file=sys.stderr)
        return error.exit_code
    rows = compare(forecast, measured, seq_len=options.seq_len)
    for name, row in rows.items():
        print(f"{name:25} forecast {row['forecast']:14.6g}  measured {row['measured']:14.6g}  ratio {row['ratio']:.2f}")
    print(json.dumps({**shared, "device": measured["device"], "torch": torch.__version__, "compared": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
