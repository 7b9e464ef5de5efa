"""Options and arguments that several commands take, and the names that their values may have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DeviceOption",
    "DtypeName",
    "DtypeOption",
    "JsonOption",
    "MetricName",
    "ModelOption",
    "ObjectiveName",
    "PlanArgument",
    "QuietOption",
    "SamplerName",
    "SplitName",
    "TrustOption",
]


class SamplerName(StrEnum):
    """Search methods that ``--sampler`` takes."""

    PAIRSET = "pairset"
    EVOLUTION = "evolution"
    NSGA2 = "nsga2"
    TPE = "tpe"
    RANDOM = "random"
    WINDOW = "window"


class DtypeName(StrEnum):
    """Dtypes of the weights that ``--dtype`` takes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class MetricName(StrEnum):
    """Losses that ``--metric`` takes."""

    NLL = "nll"
    KL = "kl"


class ObjectiveName(StrEnum):
    """What ``--objective`` trades against the loss."""

    DEPTH = "depth"
    LATENCY = "latency"


class SplitName(StrEnum):
    """Windows of the data that ``--split`` takes."""

    PROXY = "proxy"
    HELDOUT = "heldout"


PlanArgument = Annotated[Path, typer.Argument(help="plan file, or a directory that holds plan.json", metavar="PLAN")]
ModelOption = Annotated[
    str | None, typer.Option(help="alias (see `lpsearch models`), hub id, directory or .gguf file", metavar="MODEL")
]
DeviceOption = Annotated[str, typer.Option(help="torch device, or auto")]
DtypeOption = Annotated[DtypeName, typer.Option(help="dtype of the weights; auto: bfloat16 where it is fast")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="run the model's own Python code from the hub")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="warnings and the result only")]
JsonOption = Annotated[bool, typer.Option("--json", help="for programs: every line on stderr is a JSON object too")]
