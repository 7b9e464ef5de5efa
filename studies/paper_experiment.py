"""The steps of ``paper.py`` for one model, each run once."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lpsearch.commands.checks import read_num_layers
from lpsearch.commands.loading import resolve_dtype
from lpsearch.commands.tasks import TaskRun
from lpsearch.data import build_windows
from lpsearch.errors import StudyError
from lpsearch.latency import LatencyProfile
from lpsearch.latency.workload import Workload, limit_context
from lpsearch.models import load_model, resolve_source
from lpsearch.plan import Plan, load_plan
from studies.paper_steps import Variant, is_done, measure_times, read_times, run_command, run_step, score_variants
from studies.real_fronts import list_blocks

__all__ = ["Experiment", "ModelPlan", "get_workload"]


@dataclass(frozen=True)
class ModelPlan:
    """What is done with one model.

    Attributes:
        model: as ``--model`` takes it.
        config: its shape.
        directory: of its steps.
        num_joins: of the plans that are compared.
        profile: where step times are read; None to measure them.
    """

    model: str
    config: PretrainedConfig
    directory: Path
    num_joins: tuple[int, ...]
    profile: LatencyProfile | None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return read_num_layers(self.config)


@dataclass(frozen=True)
class Chosen:
    """A plan that is compared.

    Attributes:
        name: e.g. ``block 6``.
        file: its plan file.
        plan: what is in it.
        proxy_delta_nll: what it loses on the windows that were searched, nats per token.
    """

    name: str
    file: Path
    plan: Plan
    proxy_delta_nll: float


class Experiment:
    """The steps of one model; each runs once.

    Args:
        options: of the command line.
        model_plan: the model.
        device: where everything runs.
        tasks: to score; None for losses alone.
    """

    def __init__(
        self, options: argparse.Namespace, model_plan: ModelPlan, device: torch.device, tasks: TaskRun | None
    ) -> None:
        self._options, self._model_plan, self._device, self._tasks = options, model_plan, device, tasks

    def list_search_commands(self) -> dict[str, list[str]]:
        """Return the command lines of both searches, by the name of the step."""
        options, most = self._options, max(self._model_plan.num_joins)
        num_blocks = sum(plan.num_joins <= most for plan in list_blocks(self._model_plan.num_layers))
        budgets = {"blocks": ("window", num_blocks + 1), "front": ("pairset", options.budget)}
        return {
            name: [
                *("optimize", "--model", self._model_plan.model, "--sampler", sampler, "--budget", str(budget)),
                *("--data", options.data, "--windows", str(options.windows), "--seq-len", str(options.seq_len)),
                *("--latency", "off", "--seed", str(options.seed), "--device", options.device),
                *("--dtype", options.dtype, "--out", str(self._model_plan.directory / name)),
            ]
            for name, (sampler, budget) in budgets.items()
        }

    def list_recovery_commands(self, name: str, plan_file: str) -> dict[str, list[str]]:
        """Return the command lines that repair a plan, by the name of the step."""
        options = self._options
        common = ["--model", self._model_plan.model, "--seq-len", str(options.seq_len), "--seed", str(options.seed)]
        common += [part for spec in options.fit_data for part in ("--data", spec)]
        common += ["--device", options.device, "--dtype", options.dtype]
        methods = {"refit": ["--windows", str(options.fit_windows)]}
        if options.distill_tokens:
            methods["distill"] = ["--windows", str(options.distill_windows), "--tokens", str(options.distill_tokens)]
            methods["distill"] += ["--train", options.train, "--learning-rate", str(options.learning_rate)]
            methods["distill"] += [] if options.lora is None else ["--lora", str(options.lora)]
            methods["distill"] += ["--checkpointing"] if options.checkpointing else []
        return {
            f"{name}-{method}": [
                *("recover", plan_file, "--method", method, *own, *common),
                *("--out", str(self._model_plan.directory / f"{name}-{method}")),
            ]
            for method, own in methods.items()
        }

    def run(self) -> dict[str, Any]:
        """Run what was not run yet, and return everything that was found."""
        if self._options.times_only:
            return self._run_times_alone()
        steps = {name: self._run_command(name, line) for name, line in self.list_search_commands().items()}
        chosen = [
            self._choose(name, steps[step]["result"], step, num_joins)
            for num_joins in self._model_plan.num_joins
            for step, name in (("blocks", f"block {num_joins}"), ("front", f"front {num_joins}"))
        ]
        variants = {}
        for item in chosen:
            variants[item.name] = Variant(item.plan)
            slug = item.name.replace(" ", "-")
            for step, line in self.list_recovery_commands(slug, str(item.file)).items():
                steps[step] = self._run_command(step, line, joins=list(item.plan.joins))
                method = step.removeprefix(f"{slug}-")
                variants[f"{item.name}, {method}"] = Variant(item.plan, self._model_plan.directory / step)
        joins = {item.name: list(item.plan.joins) for item in chosen}
        steps["scores"] = self._run(
            "scores", {**self._describe_scores(), "joins": joins}, partial(self._score, variants)
        )
        if (times := self._describe_times()) is not None:
            plans = {item.name: item.plan for item in chosen}
            steps["times"] = self._run("times", {**times, "joins": joins}, partial(self._time, plans))
        return {
            "model": self._model_plan.model,
            "num_layers": self._model_plan.num_layers,
            "plans": {
                item.name: {
                    "joins": list(item.plan.joins),
                    "depth_reduction": item.plan.depth_reduction,
                    "proxy_delta_nll": item.proxy_delta_nll,
                    "file": str(item.file),
                }
                for item in chosen
            },
            "steps": steps,
        }

    def _run_times_alone(self) -> dict[str, Any]:
        """Time blocks of pairs at the end of the model; which pairs they are does not change a step's time."""
        num_layers = self._model_plan.num_layers
        plans = {
            f"{k} pair{'s' * (k > 1)}": Plan.from_joins(num_layers, range(num_layers - 2 * k, num_layers, 2))
            for k in self._model_plan.num_joins
        }
        settings = {**(self._describe_times() or {}), "joins": {name: list(plan.joins) for name, plan in plans.items()}}
        return {
            "model": self._model_plan.model,
            "num_layers": num_layers,
            "plans": {
                name: {"joins": list(plan.joins), "depth_reduction": plan.depth_reduction}
                for name, plan in plans.items()
            },
            "steps": {"times": self._run("times", settings, partial(self._time, plans))},
        }

    def describe_steps(self) -> list[str]:
        """Say what would be run, and what is there already; nothing is run."""
        directory = self._model_plan.directory
        if self._options.times_only:
            done = (directory / "times.json").exists()
            return [f"times: {'done' if done else json.dumps(self._describe_times())}"]
        lines = []
        for name, line in self.list_search_commands().items():
            state = "done" if is_done(directory / f"{name}.json", {"command": line}) else "lpsearch " + shlex.join(line)
            lines.append(f"{name}: {state}")
        for num_joins in self._model_plan.num_joins:
            for step in ("block", "front"):
                for name, line in self.list_recovery_commands(f"{step}-{num_joins}", "PLAN").items():
                    state = "done" if (directory / f"{name}.json").exists() else "lpsearch " + shlex.join(line)
                    lines.append(f"{name}: {state}")
        for name, settings in {"scores": self._describe_scores(), "times": self._describe_times()}.items():
            if settings is None:
                lines.append(f"{name}: left out: {self.explain_missing_times()}")
            else:
                state = "done" if (directory / f"{name}.json").exists() else json.dumps(settings)
                lines.append(f"{name}: {state}")
        return lines

    def explain_missing_times(self) -> str | None:
        """Say why there are no step times; None where there are."""
        if self._options.no_times:
            return "--no-times"
        if self._model_plan.profile is None and self._device.type != "cuda":
            return f"{self._device.type} is no GPU; give --latency PROFILE.json, or run this on a CUDA device"
        return None

    def _run(self, name: str, settings: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        return run_step(self._model_plan.directory / f"{name}.json", settings, self._device, run)

    def _run_command(self, name: str, line: list[str], **settings: Any) -> dict[str, Any]:
        return self._run(name, {"command": line, **settings}, partial(run_command, line))

    def _choose(self, name: str, result: Mapping[str, Any], step: str, num_joins: int) -> Chosen:
        """Return the plan of a search's front with so many joins; with more where such a plan loses even less."""
        found = [entry for entry in result["front"] if entry["num_joins"] >= num_joins]
        if not found:
            raise StudyError(
                f"{self._model_plan.directory / step}: no plan with {num_joins} joins is on the front; raise --budget "
                "and give another --out, or compare fewer --joins"
            )
        entry = min(found, key=lambda entry: entry["num_joins"])
        file = self._model_plan.directory / step / entry["plan"]
        return Chosen(name, file, load_plan(file), entry["delta_nll"])

    def _describe_scores(self) -> dict[str, Any]:
        options = self._options
        return {
            "test": options.test,
            "test_windows": options.test_windows,
            "seq_len": options.seq_len,
            "seed": options.seed,
            "dtype": str(resolve_dtype(options.dtype, self._device)).removeprefix("torch."),
            "tasks": options.tasks,
            "task_path": None if options.task_path is None else str(options.task_path),
            "limit": options.limit,
            "recoveries": ["refit", *(["distill"] if options.distill_tokens else [])],
        }

    def _score(self, variants: Mapping[str, Variant]) -> dict[str, Any]:
        options = self._options
        loaded = load_model(
            resolve_source(self._model_plan.model),
            device=self._device,
            dtype=resolve_dtype(options.dtype, self._device),
        )
        texts = {
            spec: build_windows(
                spec,
                tokenizer=loaded.tokenizer,
                num_windows=options.test_windows,
                seq_len=options.seq_len,
                split="heldout",
                seed=options.seed,
                model=loaded.model,
            )
            for spec in options.test
        }
        return score_variants(loaded, variants, texts, self._tasks)

    def _describe_times(self) -> dict[str, Any] | None:
        """Return the settings of the step times; None where there are none."""
        if self.explain_missing_times() is not None:
            return None
        if self._model_plan.profile is not None:
            return {"profile": self._model_plan.profile.model_dump(mode="json")}
        workload = get_workload(self._options, self._model_plan.config)
        return {
            "batch_size": workload.batch_size,
            "context_len": workload.context_len,
            "dtype": str(resolve_dtype(self._options.dtype, self._device)).removeprefix("torch."),
            "seconds": self._options.seconds,
        }

    def _time(self, plans: Mapping[str, Plan]) -> dict[str, Any]:
        if self._model_plan.profile is not None:
            return read_times(self._model_plan.profile, plans)
        return measure_times(
            self._model_plan.config,
            plans,
            get_workload(self._options, self._model_plan.config),
            device=self._device,
            dtype=resolve_dtype(self._options.dtype, self._device),
            seconds=self._options.seconds,
        )


def get_workload(options: argparse.Namespace, config: PretrainedConfig) -> Workload:
    """Return the decode step that is timed."""
    return Workload("decode", options.batch, limit_context(config, options.context))
