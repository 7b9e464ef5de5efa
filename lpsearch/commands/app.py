"""The command line interface: what can be typed. Each command's work is in the module of its name.

Modules that import torch are imported inside the commands, so that ``lpsearch --help`` answers at once.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from lpsearch.commands.console import Answer, run_command
from lpsearch.commands.options import (
    DeviceOption,
    DtypeName,
    DtypeOption,
    JsonOption,
    MetricName,
    ModelOption,
    ObjectiveName,
    PlanArgument,
    QuietOption,
    SamplerName,
    SplitName,
    TrustOption,
)

__all__ = ["app", "main"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _App(typer.Typer):
    """Commands that all take ``--quiet`` and ``--json``; :func:`main` has acted on them by the time one runs."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[_Function], _Function]:
        """Register a command."""
        register = super().command(name, **options)

        def add(function: _Function) -> _Function:
            @functools.wraps(function)
            def call(*arguments: Any, quiet: bool, json: bool, **named: Any) -> Any:
                return function(*arguments, **named)

            signature = inspect.signature(function, eval_str=True)
            shared = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
                for name, annotation in {"quiet": QuietOption, "json": JsonOption}.items()
            ]
            parameters = [*signature.parameters.values(), *shared]
            call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
            call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
            register(call)
            return function

        return add


app = _App(
    name="lpsearch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = _App(help="Look at plan files.", no_args_is_help=True)
cache_app = _App(help="Look at or clear the cache of packaged models and sampled windows.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")
app.add_typer(cache_app, name="cache")


@app.callback()
def take_shared_options(quiet: QuietOption = False, json: JsonOption = False) -> None:
    """Find which layers of an LLM can run in parallel, what that saves on your GPUs and what it costs in accuracy."""


@app.command()
def optimize(
    model: ModelOption = None,
    budget: Annotated[int | None, typer.Option(help="distinct finished plans in total, baseline included")] = None,
    data: Annotated[
        str | None, typer.Option(help="wikitext2, a hub dataset, a text/jsonl/parquet file, or self")
    ] = None,
    heldout: Annotated[str | None, typer.Option(help="data to report on; default: what goes with --data")] = None,
    windows: Annotated[int | None, typer.Option(help="evaluation windows")] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens in a window")] = None,
    max_group: Annotated[int | None, typer.Option(help="most layers in a group")] = None,
    metric: Annotated[MetricName | None, typer.Option(help="loss on the data, or divergence from the base")] = None,
    objective: Annotated[ObjectiveName | None, typer.Option(help="what is traded against the loss")] = None,
    sampler: Annotated[SamplerName | None, typer.Option(help="search method")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the search and of sampled data")] = None,
    device: Annotated[str | None, typer.Option(help="torch device, or auto")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="dtype of the weights")] = None,
    freeze: Annotated[str | None, typer.Option(help="layers that stay alone, e.g. 0,1,28-29", metavar="LAYERS")] = None,
    enqueue: Annotated[list[Path] | None, typer.Option(help="plan file to evaluate first", metavar="PLAN")] = None,
    latency: Annotated[
        str | None, typer.Option(help="auto, off, or a profile", metavar="auto|off|PROFILE.json")
    ] = None,
    study: Annotated[str | None, typer.Option(help="name of the Optuna study")] = None,
    out: Annotated[Path | None, typer.Option(help="directory of the results; default studies/MODEL")] = None,
    storage: Annotated[str | None, typer.Option(help="database URL; default study.db in --out", metavar="URL")] = None,
    timeout: Annotated[float | None, typer.Option(help="seconds after which no further trial starts")] = None,
    staged: Annotated[
        bool | None,
        typer.Option("--staged/--unstaged", help="few windows first, all for plans near the front; default: staged"),
    ] = None,
    trust_remote_code: TrustOption = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="move an existing study aside and begin a new one")] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file with the names of these options")] = None,
) -> Answer:
    """Search a model's plans and write the front of depth reduction against accuracy."""
    options: dict[str, Any] = {
        "model": model,
        "budget": budget,
        "data": data,
        "heldout": heldout,
        "windows": windows,
        "seq_len": seq_len,
        "max_group": max_group,
        "metric": metric,
        "objective": objective,
        "sampler": sampler,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "freeze": freeze,
        "enqueue": enqueue or None,
        "latency": latency,
        "study": study,
        "out": out,
        "storage": storage,
        "timeout": timeout,
        "staged": staged,
        "trust_remote_code": trust_remote_code or None,
    }
    from lpsearch.commands.optimize import optimize as run_optimize
    from lpsearch.config import resolve_config

    return run_optimize(resolve_config(command_line=options, config_file=config), fresh=fresh)


@app.command()
def evaluate(
    plan: PlanArgument,
    model: ModelOption = None,
    data: Annotated[str | None, typer.Option(help="as for optimize; default: what the plan was checked on")] = None,
    windows: Annotated[int | None, typer.Option(help="evaluation windows; default: as many as there", min=1)] = None,
    seq_len: Annotated[int | None, typer.Option(help="tokens in a window; default: as many as there", min=2)] = None,
    metric: Annotated[MetricName, typer.Option(help="kl also measures the divergence from the base")] = MetricName.NLL,
    split: Annotated[SplitName, typer.Option(help="windows that a search uses, or those held out from it")] = (
        SplitName.HELDOUT
    ),
    seed: Annotated[int | None, typer.Option(help="seed of sampled data; default: the study's", min=0)] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = DtypeName.AUTO,
    trust_remote_code: TrustOption = False,
) -> dict[str, Any]:
    """Measure a plan's loss against the unmodified model on any data."""
    from lpsearch.commands.evaluate import evaluate as run_evaluate

    return run_evaluate(
        plan,
        model=model,
        data=data,
        num_windows=windows,
        seq_len=seq_len,
        metric=metric.value,
        split=split.value,
        seed=seed,
        device=device,
        dtype=dtype.value,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def export(
    plan: PlanArgument,
    directory: Annotated[Path, typer.Argument(help="new directory to write", metavar="DIR")],
    model: ModelOption = None,
    dtype: Annotated[DtypeName, typer.Option(help="dtype to write; auto: the one that the weights are stored in")] = (
        DtypeName.AUTO
    ),
) -> dict[str, Any]:
    """Write a checkpoint with fused layers, which transformers and vLLM load without lpsearch."""
    from lpsearch.commands.export import export as run_export

    return run_export(plan, directory, model=model, dtype=dtype.value)


@app.command()
def generate(
    plan: Annotated[
        Path, typer.Argument(help="plan file, or a directory that export or recover wrote", metavar="DIR|PLAN")
    ],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to generate", min=1)] = 64,
    compare: Annotated[bool, typer.Option("--compare", help="also generate with the unmodified model")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = DtypeName.AUTO,
    trust_remote_code: TrustOption = False,
) -> dict[str, Any]:
    """Continue a prompt with a plan or an exported directory, greedily, and show the text as it comes."""
    from lpsearch.commands.generate import generate as run_generate

    return run_generate(
        plan,
        prompt=prompt,
        model=model,
        max_new_tokens=max_new_tokens,
        compare=compare,
        device=device,
        dtype=dtype.value,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def profile(
    model: ModelOption = None,
    out: Annotated[Path, typer.Option(help="profile file to write")] = Path("profile.json"),
    batch: Annotated[str, typer.Option(help="sequences decoded together, e.g. 1,16,64")] = "1",
    context: Annotated[str, typer.Option(help="cached tokens of each sequence, e.g. 1024,4096")] = "1024",
    prefill: Annotated[str | None, typer.Option(help="tokens of prompts to time as well, e.g. 2048")] = None,
    max_group: Annotated[int, typer.Option(help="most layers in a group", min=2)] = 2,
    device: DeviceOption = "auto",
    dtype: DtypeOption = DtypeName.AUTO,
    tp: Annotated[int, typer.Option(help="GPUs that share the model (tensor parallelism)", min=1)] = 1,
    emulate_tp: Annotated[int | None, typer.Option(help="estimate for so many GPUs from one of them", min=2)] = None,
    all_reduce_us: Annotated[
        float | None, typer.Option(help="with --emulate-tp: time of one sum over those GPUs", min=0)
    ] = None,
    seconds: Annotated[float, typer.Option(help="about how long each workload is timed", min=0)] = 15.0,
) -> Answer | dict[str, Any]:
    """Measure the latency of a model's shape at a few depths; needs no weights for a known alias."""
    from lpsearch.commands.profile import parse_counts
    from lpsearch.commands.profile import profile as run_profile

    return run_profile(
        model,
        out=out,
        batch_sizes=parse_counts(batch, option="--batch", least=1),
        context_lens=parse_counts(context, option="--context", least=0),
        prefill_lens=parse_counts(prefill, option="--prefill", least=1) if prefill else (),
        max_group=max_group,
        device=device,
        dtype=dtype.value,
        tp=tp,
        emulate_tp=emulate_tp,
        all_reduce_us=all_reduce_us,
        seconds=seconds,
    )


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="directory that optimize wrote", metavar="DIR")],
    storage: Annotated[str | None, typer.Option(help="database URL; default study.db in DIR", metavar="URL")] = None,
    study: Annotated[str | None, typer.Option(help="name of the study; default: that of DIR")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; default report.html in DIR", metavar="FILE")] = None,
) -> dict[str, Any]:
    """Write a study's report, finished or not, as one HTML file that needs no network."""
    from lpsearch.commands.report import report as write_report

    return write_report(directory, storage=storage, study=study, out=out)


@app.command()
def dashboard(
    directory: Annotated[Path, typer.Argument(help="directory that optimize wrote", metavar="DIR")],
    port: Annotated[int, typer.Option(help="port of 127.0.0.1; 0: any free one", min=0, max=65535)] = 8080,
    storage: Annotated[str | None, typer.Option(help="database URL; default study.db in DIR", metavar="URL")] = None,
    study: Annotated[str | None, typer.Option(help="name of the study; default: that of DIR")] = None,
) -> dict[str, Any]:
    """Serve a study, finished or not: its live figures and optuna-dashboard, until Ctrl-C."""
    from lpsearch.commands.dashboard import dashboard as serve_dashboard

    return serve_dashboard(directory, port=port, storage=storage, study=study)


@app.command()
def models() -> Answer:
    """List the aliases that --model takes."""
    from lpsearch.commands.models import list_models

    return list_models()


@plan_app.command("show")
def plan_show(plan: PlanArgument) -> dict[str, Any]:
    """Print a plan: its groups, its model and what was measured."""
    from lpsearch.commands.plan import show_plan

    return show_plan(plan)


@plan_app.command("validate")
def plan_validate(plan: PlanArgument, model: ModelOption = None) -> dict[str, Any]:
    """Check a plan file, and with --model that it is for that model."""
    from lpsearch.commands.plan import validate_plan

    return validate_plan(plan, model=model)


@plan_app.command("diff")
def plan_diff(first: PlanArgument, second: PlanArgument) -> dict[str, Any]:
    """Print the joins in which two plans differ."""
    from lpsearch.commands.plan import diff_plans

    return diff_plans(first, second)


@plan_app.command("pick")
def plan_pick(
    study_dir: Annotated[Path, typer.Argument(help="directory that optimize wrote", metavar="STUDY_DIR")],
    max_delta: Annotated[
        float | None, typer.Option(help="largest loss, by the search's metric, in nats per token")
    ] = None,
    min_speedup: Annotated[float | None, typer.Option(help="smallest speed-up")] = None,
) -> dict[str, Any]:
    """Pick the deepest plan of a study's front within a loss, or the best one beyond a speed-up."""
    from lpsearch.commands.plan import pick_plan

    return pick_plan(study_dir, max_delta=max_delta, min_speedup=min_speedup)


@plan_app.command("schema")
def plan_schema() -> dict[str, Any]:
    """Print the JSON Schema of the plan file."""
    from lpsearch.plan import build_plan_schema

    return build_plan_schema()


@cache_app.command("show")
def cache_show() -> dict[str, Any]:
    """Print where the cache is and what it holds."""
    from lpsearch.commands.cache import show_cache

    return show_cache()


@cache_app.command("clear")
def cache_clear() -> dict[str, Any]:
    """Delete the cache; everything in it can be made again."""
    from lpsearch.commands.cache import clear_cache

    return clear_cache()


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Args:
        argv: the arguments; None takes the process's own.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    # Looked for before anything is parsed, since a wrong option must be told in the form that was asked for.
    flags = _find_flags(arguments)
    run_command(
        lambda: app(args=arguments, prog_name="lpsearch", standalone_mode=False),
        quiet="--quiet" in flags,
        as_json="--json" in flags,
    )


def _find_flags(arguments: Sequence[str]) -> set[str]:
    """Return the words that stand where an option would, and not as the value of one, e.g. ``--prompt --json``."""
    command: Any = typer.main.get_command(app)
    found: set[str] = set()
    words = iter(arguments)
    for word in words:
        if word == "--":
            break
        if any(word in (*option.opts, *option.secondary_opts) for option in command.params if _takes_value(option)):
            next(words, None)
        elif word in getattr(command, "commands", {}):
            command = command.commands[word]
        else:
            found.add(word)
    return found


def _takes_value(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option" and not parameter.is_flag)
