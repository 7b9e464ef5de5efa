r"""The paper's experiment in one command: the best block of pairs against the found front, at about a fifth less depth.

The paper (arXiv 2502.02790) runs a block, a contiguous run of pairs, in parallel. For each ``--model`` (Llama 2 7B and
Llama 3.2 3B by default, whose weights the hub gives to who has accepted their terms) these steps run:

1. ``blocks``: every block is evaluated, by ``lpsearch optimize --sampler window``.
2. ``front``: ``lpsearch optimize --sampler pairset`` searches all sets of pairs, on the same windows.
3. ``<plan>-refit`` and ``<plan>-distill``: ``lpsearch recover`` repairs the best plan of each number of joins.
4. ``scores``: perplexity on ``--test``, which is neither searched nor fitted, and ``--tasks``, before and after repair.
5. ``times``: the time of a decode step in eager, graph and compiled, each mode against the unmodified model in the same
   mode. These need a GPU, or come from the file of ``lpsearch profile`` (``--latency``).

Each step writes its JSON into ``--out``, and is not run again when the same command is: so it goes on after any
interruption. The tables are printed as Markdown and written to ``paper.md`` and ``paper.json``.

    python studies/paper.py --out paper --tasks arc_easy,hellaswag,gsm8k
    python studies/paper.py --out paper --model smollm2-135m --data wikitext2 --distill-tokens 10000000
    python studies/paper.py --out paper --dry-run
    python studies/paper.py --out times --times-only
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.commands.checks import read_num_layers
from lpsearch.commands.loading import describe_device, resolve_device
from lpsearch.commands.outputs import prepare_directory
from lpsearch.commands.tasks import prepare_tasks
from lpsearch.config import LEARNING_RATE, slug_of_model
from lpsearch.data import check_seq_len, check_text_kinds, is_same_text
from lpsearch.errors import ConfigError, LpsearchError, describe_error
from lpsearch.kinds import parse_kinds
from lpsearch.latency import LatencyProfile, load_profile
from lpsearch.latency.profile import check_profile_geometry
from lpsearch.latency.workload import check_workloads
from lpsearch.models import load_geometry
from lpsearch.plan import write_json
from lpsearch.versions import read_versions
from studies.paper_experiment import Experiment, ModelPlan, get_workload
from studies.paper_tables import build_tables

MODELS = ("llama2-7b", "llama3.2-3b")
PERCENTS = range(18, 22)
"""Depth reductions of the comparison, in rounded percents."""

TRAINING_TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:train"


def choose_num_joins(num_layers: int) -> tuple[int, ...]:
    """Return the numbers of pairs that take away 18 to 21 % of the depth, or the one nearest to 20 %."""
    fitting = [k for k in range(1, num_layers // 2 + 1) if round(100 * k / num_layers) in PERCENTS]
    nearest = min(range(1, num_layers // 2 + 1), key=lambda k: abs(k / num_layers - 0.2), default=0)
    return tuple(fitting or [nearest])


def prepare(options: argparse.Namespace) -> tuple[list[Experiment], torch.device]:
    """Check everything that can be checked before a model is loaded.

    Raises:
        UsageError: for what cannot work.
        SourceError: if a text or a task's data is out of reach.
    """
    device = resolve_device(options.device)
    if options.times_only and options.no_times:
        raise ConfigError("--times-only, --no-times: nothing is left to run; give one of them")
    models = tuple(dict.fromkeys(options.model or MODELS))
    slugs = [slug_of_model(model) for model in models]
    if len(set(slugs)) < len(slugs):
        raise ConfigError(f"--model: two of {', '.join(models)} would share a directory; run them alone")
    profiles = [load_profile(path) for path in options.latency]
    planned = []
    for model, slug in zip(models, slugs, strict=True):
        config = load_geometry(model)
        if not options.times_only:
            check_seq_len(options.seq_len, config)
        if device.type == "cuda":
            check_workloads(config, [get_workload(options, config)])
        profile = next((profile for profile in profiles if _fits(profile, config)), None)
        planned.append(ModelPlan(model, config, options.out / slug, _find_num_joins(options, model, config), profile))
    used = [item.profile for item in planned]
    for path, profile in zip(options.latency, profiles, strict=True):
        if profile not in used:
            raise ConfigError(f"--latency {path}: is of the shape of none of {', '.join(models)}; measure one of them")
    tasks = None
    if options.times_only:
        _check_times([Experiment(options, item, device, None) for item in planned])
    else:
        _check_texts(options)
    if not options.dry_run:
        prepare_directory(options.out)
        for item in planned:
            prepare_directory(item.directory)
    if not (options.dry_run or options.times_only):
        tasks = prepare_tasks(
            options.tasks,
            task_path=options.task_path,
            num_fewshot=None,
            limit=options.limit,
            batch_size=options.batch_size,
            apply_chat_template=False,
        )
    return [Experiment(options, item, device, tasks) for item in planned], device


def _fits(profile: LatencyProfile, config: PretrainedConfig) -> bool:
    try:
        check_profile_geometry(profile, config)
    except ConfigError:
        return False
    return True


def _find_num_joins(options: argparse.Namespace, model: str, config: PretrainedConfig) -> tuple[int, ...]:
    num_layers = read_num_layers(config)
    if options.joins is None:
        return choose_num_joins(num_layers)
    try:
        num_joins = tuple(dict.fromkeys(int(part) for part in options.joins.split(",")))
    except ValueError:
        raise ConfigError(f"--joins {options.joins}: give numbers of pairs with commas between, e.g. 5,6") from None
    if not all(1 <= k <= num_layers // 2 for k in num_joins):
        raise ConfigError(f"--joins {options.joins}: {model} has {num_layers} layers, so 1 to {num_layers // 2} pairs")
    return num_joins


def _check_times(experiments: Sequence[Experiment]) -> None:
    """Refuse --times-only where there would be no times."""
    for experiment in experiments:
        if (reason := experiment.explain_missing_times()) is not None:
            raise ConfigError(f"--times-only: {reason}")


def _check_texts(options: argparse.Namespace) -> None:
    """Refuse texts that are not there, and a test on what was searched or fitted."""
    check_text_kinds([options.data], split="proxy")
    check_text_kinds(options.fit_data, split="proxy")
    check_text_kinds(options.test, split="heldout")
    seen = [options.data, *(kind.spec for kind in parse_kinds(options.fit_data))]
    for spec in options.test:
        # wikitext2 alone means another split for the test than for a search.
        if any(is_same_text(_name_split(used), spec, split="heldout") for used in seen):
            raise ConfigError(f"--test {spec}: the same text is searched or fitted on; give one that is not")


def _name_split(spec: str) -> str:
    return "wikitext2:validation" if spec == "wikitext2" else spec


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of the steps' files; the same one goes on")
    add("--model", action="append", help=f"may be repeated; default: {' and '.join(MODELS)}")
    add("--joins", help="numbers of pairs to compare, e.g. 5,6; default: what takes away 18 to 21 %% of the depth")
    add("--data", default="wikitext2", help="text to search on, as for lpsearch optimize")
    add("--windows", type=_count, default=16, help="windows to search on")
    add("--seq-len", type=_count, default=2048, help="tokens in every window")
    add("--budget", type=_count, default=200, help="plans that the search of the front evaluates")
    add("--fit-data", action="append", help=f"text to repair on; may be repeated; default: {TRAINING_TEXT} and self")
    add("--fit-windows", type=_count, default=64, help="windows of each text to refit to")
    add("--distill-windows", type=_count, default=512, help="windows of each text to distill on")
    add("--distill-tokens", type=_count_or_none, default=10_000_000, help="tokens to distill on; 0 for the refit alone")
    add("--learning-rate", type=float, default=LEARNING_RATE, help="of distilling")
    add("--train", choices=["all", "grouped"], default="all", help="layers that distilling trains")
    add("--lora", type=_count, help="distill adapters of this rank instead of whole weights")
    add("--checkpointing", action="store_true", help="distill with less memory, more slowly")
    add("--test", action="append", help="text to measure on; may be repeated; default: wikitext2, its test split")
    add("--test-windows", type=_count, default=128, help="windows of each test text")
    add("--tasks", help="tasks of lm-evaluation-harness, e.g. arc_easy,hellaswag,gsm8k")
    add("--task-path", type=Path, help="directory of task files beside the harness's own")
    add("--limit", type=_count, help="documents of each task; default: all")
    add("--batch-size", type=_count, default=8, help="sequences of a task that are run together")
    add("--latency", type=Path, action="append", default=[], help="file of lpsearch profile to read times from")
    add("--no-times", action="store_true", help="leave the step times out")
    add("--times-only", action="store_true", help="only time blocks of --joins pairs; needs no weights and no text")
    add("--batch", type=_count, default=1, help="sequences of the decode step that is timed")
    add("--context", type=_count, default=1024, help="their cached tokens")
    add("--seconds", type=float, default=10.0, help="about how long each mode is timed")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    add("--dry-run", action="store_true", help="say what would be run, and run nothing")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; print the tables, and the same as JSON on the last line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(given)
    options.test = options.test or ["wikitext2"]
    options.fit_data = options.fit_data or [TRAINING_TEXT, "self"]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("lpsearch", "studies"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        experiments, device = prepare(options)
        if options.dry_run:
            for experiment in experiments:
                print("\n".join(experiment.describe_steps()))
            return 0
        document: dict[str, Any] = {
            "command": shlex.join(["python", "studies/paper.py", *given]),
            "device": describe_device(device),
            "versions": read_versions(),
            "models": [],
        }
        for experiment in experiments:
            found = experiment.run()
            document["models"].append({**found, "left_out_times": experiment.explain_missing_times()})
        tables = build_tables(document)
        write_json(document, options.out / "paper.json")
        (options.out / "paper.md").write_text(tables, encoding="utf-8")
    except LpsearchError as error:
        print(f"paper: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(
            f"paper: {options.out}: cannot be written ({describe_error(error)}); what is finished stays",
            file=sys.stderr,
        )
        return 1
    print(tables)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
