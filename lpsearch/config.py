"""The configuration of ``optimize``: its fields, and where each value comes from.

Precedence, highest first: command line, ``--config`` file, the model's preset (package data), defaults. This module
imports neither torch nor optuna.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lpsearch.errors import ConfigError, mask_urls

__all__ = [
    "Allowed",
    "CacheLocation",
    "DeviceMap",
    "Dtype",
    "Metric",
    "Objective",
    "OptimizeConfig",
    "Recover",
    "ResolvedConfig",
    "Split",
    "StoredSplit",
    "check_device_map",
    "parse_allowed",
    "parse_layer_list",
    "resolve_config",
    "slug_of_model",
]

Allowed = Literal["joins", "drop-attention", "drop-mlp"]
"""What a plan may do to a model: put neighbouring layers into one group, or drop a branch of a layer."""

Metric = Literal["nll", "kl"]
"""The loss that is searched: the negative log-likelihood, or the divergence from the unmodified model."""

Objective = Literal["depth", "latency"]
"""What is traded against the loss."""

Recover = Literal["off", "refit"]
"""What is done to a plan's weights before its losses are measured: nothing, or a refit in closed form."""

Split = Literal["proxy", "heldout"]
"""What windows are for: to search on, or to check the front on windows that the search never saw."""

StoredSplit = Literal["proxy", "heldout", "calibration"]
"""What the windows that a study keeps are for: also those that repairs are fitted to."""

DeviceMap = Literal["single", "auto"]
"""Where a model is: on one device, or spread over all by accelerate."""

CacheLocation = Literal["device", "host"]
"""Where hidden states are kept: on the device, or in host memory."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

LEARNING_RATE = 2e-3
"""Largest learning rate of distilling, relative to the size of each weight; see :mod:`lpsearch.recovery.optimizer`."""

_MAX_LAYER_DIGITS = 5
"""Digits of a layer's number at most: a range is written out in memory."""


class OptimizeConfig(BaseModel):
    """Everything that ``optimize`` can be told, declared once: each field is an option of the command line.

    The option's name is the field's with hyphens; its help is the field's ``description``, its range and its choices
    are those of the type. ``json_schema_extra`` holds what only a command line needs: ``metavar`` names the value,
    ``flags`` the words of a boolean.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        min_length=1,
        description="alias (see `lpsearch models`), hub id, directory or .gguf file; must be given",
        json_schema_extra={"metavar": "MODEL"},
    )
    budget: int = Field(default=200, ge=1, description="distinct finished plans in total, baseline included")
    data: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=("wikitext2",),
        min_length=1,
        description="text to search on: wikitext2, a hub dataset, self, or a file: text, json(l), csv, tsv, parquet,"
        " also compressed; may be repeated",
        json_schema_extra={"metavar": "SPEC[@WEIGHT]"},
    )
    heldout: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="text to check the front on; may be repeated; default: what goes with each --data",
        json_schema_extra={"metavar": "SPEC[@WEIGHT]"},
    )
    windows: int = Field(default=16, ge=1, description="evaluation windows of each kind of text")
    seq_len: int = Field(default=2048, ge=2, description="tokens in a window")
    max_group: int = Field(default=2, ge=2, description="most layers in a group")
    allow: tuple[Allowed, ...] = Field(
        default=("joins",),
        description="what plans may do: joins, drops (drop-attention and drop-mlp), or several with commas between",
        json_schema_extra={"metavar": "joins|drops|joins,drops"},
    )
    metric: Metric = Field(
        default="nll", description="loss that is searched: nll on the data, or kl to the unmodified model"
    )
    worst_case: bool = Field(
        default=False,
        description="search by the loss on the worst kind of text; default: by the mean over the kinds",
        json_schema_extra={"flags": "--worst-case"},
    )
    recover: Recover = Field(
        default="off",
        description="refit scores every plan after its closed-form refit, for use with `lpsearch recover`",
    )
    objective: Objective = Field(
        default="depth", description="what is traded against the loss; where drops are allowed the default is latency"
    )
    sampler: Literal["pairset", "evolution", "nsga2", "tpe", "random", "window"] = Field(
        default="pairset", description="search method; window tries blocks, the published method"
    )
    seed: int = Field(default=0, ge=0, description="seed of the search and of sampled data")
    device: str = Field(default="auto", description="torch device, or auto")
    dtype: Dtype = Field(
        default="auto", description="dtype of the weights; auto: bfloat16 where the device is fast at it"
    )
    device_map: DeviceMap = Field(
        default="single",
        description="auto spreads a model that is larger than one GPU over all, then over host memory and disk",
    )
    cache_location: CacheLocation = Field(
        default="device",
        description="where hidden states are kept for further plans: beside the weights, or in pinned host memory",
    )
    freeze: tuple[int, ...] = Field(
        default=(),
        description="layers that no plan changes, e.g. 0,1,28-29; default: none",
        json_schema_extra={"metavar": "LAYERS"},
    )
    enqueue: tuple[Path, ...] = Field(
        default=(),
        description="plan to evaluate first; may be repeated; default: none",
        json_schema_extra={"metavar": "PLAN"},
    )
    latency: str = Field(
        default="auto",
        description="auto measures on the device, off does not; or a file that `lpsearch profile` wrote",
        json_schema_extra={"metavar": "auto|off|PROFILE.json"},
    )
    workload: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        description="workload whose latency counts: decode:SEQUENCESxTOKENS or prefill:TOKENS; several are a weighted"
        " mix; default: the first of the profile",
        json_schema_extra={"metavar": "KIND:SIZE[@WEIGHT],..."},
    )
    study: str | None = Field(
        default=None, min_length=1, description="name of the Optuna study; default: that of the model"
    )
    out: Path | None = Field(
        default=None,
        description="directory of everything written; default: studies/MODEL",
        json_schema_extra={"metavar": "DIR"},
    )
    storage: str | None = Field(
        default=None,
        min_length=1,
        description="database URL; default: study.db in --out",
        json_schema_extra={"metavar": "URL"},
    )
    executor: Literal["local", "ray"] = Field(
        default="local", description="what evaluates plans: processes of this machine, or Ray actors on many"
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        description="processes that evaluate plans, each with the model; default: one with local, with ray as many as"
        " find room",
    )
    gpus_per_worker: int | None = Field(
        default=None, ge=0, description="GPUs of each; default: one where plans are evaluated on GPUs"
    )
    ray_address: str | None = Field(
        default=None,
        min_length=1,
        description="Ray cluster to join, auto for this machine's; default: Ray is started on this machine and stopped",
        json_schema_extra={"metavar": "auto|HOST:PORT"},
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        description="seconds, above 0, after which no further trial starts; default: no limit",
        json_schema_extra={"metavar": "SECONDS"},
    )
    staged: bool = Field(
        default=True,
        description="evaluate a plan on few windows first, and on all only while it may be on the front",
        json_schema_extra={"flags": "--staged/--unstaged"},
    )
    trust_remote_code: bool = Field(
        default=False,
        description="run the model's own Python code from the hub; default: never",
        json_schema_extra={"flags": "--trust-remote-code"},
    )

    @field_validator("out", "enqueue", mode="before")
    @classmethod
    def _refuse_empty_path(cls, value: Any) -> Any:
        if value == "" or (isinstance(value, list | tuple) and "" in value):
            raise ValueError("a path is empty; the current directory is '.'")
        return value

    @field_validator("data", "heldout", "workload", mode="before")
    @classmethod
    def _take_one_text(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("freeze", mode="before")
    @classmethod
    def _parse_freeze(cls, value: Any) -> Any:
        return parse_layer_list(value) if isinstance(value, str) else value

    @field_validator("allow", mode="before")
    @classmethod
    def _parse_allow(cls, value: Any) -> Any:
        return parse_allowed([value] if isinstance(value, str) else value) if value else value

    @property
    def allows_drops(self) -> bool:
        """Whether plans may drop branches."""
        return self.allow != ("joins",)


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration and which of its fields the user named.

    Attributes:
        values: the configuration after precedence.
        explicit: fields that the command line or the ``--config`` file set. The others may give way to what a study
            recorded when it was begun.
    """

    values: OptimizeConfig
    explicit: frozenset[str]


def resolve_config(*, command_line: Mapping[str, Any], config_file: Path | None = None) -> ResolvedConfig:
    """Merge command line, configuration file, preset and defaults, in that order of precedence.

    Args:
        command_line: the options that were given; None means not given.
        config_file: a TOML file of the same names.

    Raises:
        ConfigError: for an unreadable file, an unknown name, an impossible value or no model.
    """
    given = {name: value for name, value in command_line.items() if value is not None}
    from_file = _read_toml(config_file) if config_file is not None else {}
    named = {**from_file, **given}
    if "model" not in named:
        raise ConfigError("no model was named; give --model ALIAS (`lpsearch models` lists them), a hub id or a path")
    preset = load_preset(str(named["model"]))
    try:
        values = OptimizeConfig.model_validate({**preset, **named})
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None
    if values.allows_drops and "objective" not in {**preset, **named}:
        values = values.model_copy(update={"objective": "latency"})
    check_latency(values)
    return ResolvedConfig(values, frozenset(named))


def check_latency(values: OptimizeConfig) -> None:
    """Refuse to optimise a latency that is not to be known.

    Raises:
        ConfigError: for the objective ``latency``, or a workload, with latency off.
    """
    if values.objective == "latency" and values.latency == "off":
        if values.allows_drops:
            raise ConfigError(
                "--allow with drops needs a latency, since choices save unlike times; drop --latency off, name a "
                "profile with --latency, or compare plans by depth with --objective depth"
            )
        raise ConfigError("--objective latency needs a latency to optimise; drop --latency off")
    if values.workload and values.latency == "off":
        raise ConfigError("--workload says whose latency counts, and --latency off that none does; drop either")


def check_device_map(values: OptimizeConfig) -> None:
    """Refuse to refit a model that is spread over devices.

    Raises:
        ConfigError: for both.
    """
    if values.device_map != "single" and values.recover != "off":
        raise ConfigError(
            f"--recover {values.recover} changes weights, which needs the whole model on one device; drop it, or "
            "--device-map"
        )


def load_preset(model: str) -> dict[str, Any]:
    """Return the packaged settings of an alias; empty for any other model.

    Args:
        model: alias, hub id or path.
    """
    preset = resources.files("lpsearch.presets") / f"{model}.toml"
    if "/" in model or not preset.is_file():
        return {}
    return tomllib.loads(preset.read_text(encoding="utf-8"))


def slug_of_model(model: str) -> str:
    """Return the name of a model's directory under ``studies/``: its alias, or the last part of its id or path.

    Args:
        model: alias, hub id or path, e.g. ``meta-llama/Llama-2-7b-hf`` gives ``Llama-2-7b-hf``.
    """
    name = Path(model).expanduser().name
    return name.removesuffix(".gguf") or "model"


def parse_layer_list(text: str) -> tuple[int, ...]:
    """Parse a list of layers such as ``0,1,28-29`` (ranges include both ends).

    Raises:
        ValueError: for anything else.
    """
    layers: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = part.partition("-")
        numbers = (first, last) if dash else (first,)
        if not all(number.isascii() and number.isdigit() for number in numbers):
            raise ValueError(f"{part!r} is no layer or range of layers; write e.g. 0,1,28-29")
        if any(len(number) > _MAX_LAYER_DIGITS for number in numbers):
            raise ValueError(f"{part[:40]!r} names a layer that no model has")
        if int(numbers[-1]) < int(first):
            raise ValueError(f"{part!r} is no layer or range of layers; write e.g. 0,1,28-29")
        layers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


def parse_allowed(words: Iterable[str]) -> tuple[str, ...]:
    """Parse what plans may do, e.g. ``joins,drops``, where ``drops`` stands for both kinds of branches.

    Args:
        words: one or more texts, each with commas between its parts.

    Returns:
        The kinds, each once, in the order of :data:`Allowed`.

    Raises:
        ValueError: for anything else, and for nothing.
    """
    known = get_args(Allowed)
    parts = [part.strip() for word in words for part in word.split(",")]
    unknown = [part for part in parts if part not in (*known, "drops")]
    if unknown or not parts:
        raise ValueError(f"{', '.join(map(repr, unknown))} is none of joins, drops, drop-attention and drop-mlp")
    return tuple(kind for kind in known if kind in parts or (kind != "joins" and "drops" in parts))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not a readable TOML file: {error}") from None
    return {name.replace("-", "_"): value for name, value in values.items()}


def _describe(error: ValidationError) -> str:
    """Put pydantic's findings into one line, in the names of the options."""
    findings = []
    for item in error.errors(include_url=False):
        option = "--" + str(item["loc"][0]).replace("_", "-")
        if item["type"] == "extra_forbidden":
            findings.append(_describe_unknown(option))
        else:
            said = item["msg"].removeprefix("Value error, ")  # of pydantic, before what this module says
            findings.append(f"{option}: {said}, got {mask_urls(repr(item['input']))}")
    return "; ".join(findings)


def _describe_unknown(option: str) -> str:
    """Say that a configuration file cannot set something."""
    name = option.removeprefix("--")
    if name in ("fresh", "config", "dry-run", "hardware", "quiet", "json"):
        return f"{name} cannot be set in a configuration file; give {option} on the command line"
    known = ", ".join(name.replace("_", "-") for name in OptimizeConfig.model_fields)
    return f"{name} is no setting of a configuration file; known: {known}"
