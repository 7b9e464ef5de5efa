"""Options that several commands take, and those that the fields of the configuration declare."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from lpsearch.config import DeviceMap, Dtype, OptimizeConfig
from lpsearch.errors import UsageError

__all__ = [
    "DeviceMapOption",
    "DeviceOption",
    "DirectoryArgument",
    "DtypeOption",
    "JsonOption",
    "ModelOption",
    "PlanArgument",
    "PlanModelOption",
    "QuietOption",
    "StorageOption",
    "StudyOption",
    "TrustOption",
    "refuse_empty",
    "refuse_empty_paths",
    "set_parameters",
    "with_config_options",
]

_Result = TypeVar("_Result")

_MAY_BE_EMPTY = {"freeze", "prompt"}
"""Options whose empty value means something, as no layers at all, or which their command refuses in its own words."""


PANELS = {
    "What to search": (
        *("model", "allow", "max_group", "freeze", "enqueue", "objective", "latency", "workload", "metric"),
        *("recover", "sampler", "seed"),
    ),
    "On what text": ("data", "heldout", "windows", "seq_len", "worst_case"),
    "How long": ("budget", "timeout", "staged"),
    "Where": (
        *("device", "dtype", "device_map", "cache_location", "out", "study", "storage", "fresh", "config"),
        "trust_remote_code",
    ),
    "By which processes": ("executor", "workers", "gpus_per_worker", "ray_address"),
    "Without searching": ("dry_run", "hardware"),
}
"""The groups of options in the help of ``optimize``, each in its order."""


def _describe(name: str, **details: Any) -> Any:
    """Build what typer needs to know of an option from the field of the configuration that declares it."""
    field = OptimizeConfig.model_fields[name]
    declared: Any = field.json_schema_extra or {}
    flags = [declared["flags"]] if "flags" in declared else []
    least = next((item.ge for item in field.metadata if hasattr(item, "ge")), None)
    return typer.Option(*flags, help=field.description, metavar=declared.get("metavar"), min=least, **details)


PlanArgument = Annotated[Path, typer.Argument(help="plan file, or a directory that holds plan.json", metavar="PLAN")]
DirectoryArgument = Annotated[Path, typer.Argument(help="directory that optimize wrote", metavar="DIR")]
ModelOption = Annotated[str | None, _describe("model")]
PlanModelOption = Annotated[
    str | None,
    typer.Option(
        help="where the model is: alias, hub id, directory or .gguf file; default: the one that the plan names",
        metavar="MODEL",
    ),
]
DeviceOption = Annotated[str, _describe("device")]
DeviceMapOption = Annotated[DeviceMap, _describe("device_map")]
DtypeOption = Annotated[Dtype, _describe("dtype")]
TrustOption = Annotated[bool, _describe("trust_remote_code")]
StorageOption = Annotated[str | None, typer.Option(help="database URL; default: study.db in DIR", metavar="URL")]
StudyOption = Annotated[str | None, typer.Option(help="name of the study; default: that of DIR")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="warnings and the result only")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="for programs: the result, and every line on stderr, as one JSON object")
]


def with_config_options(command: Callable[..., _Result]) -> Callable[..., _Result]:
    """Give a command an option for every field of :class:`OptimizeConfig`, before its own.

    Args:
        command: takes, as ``given``, those of these options that were typed: values by the name of the field.
    """

    @functools.wraps(command)
    def call(**arguments: Any) -> _Result:
        values = {name: arguments.pop(name) for name in OptimizeConfig.model_fields}
        given = {name: value for name, value in values.items() if value is not None and value != []}
        return command(given=given, **arguments)

    own = dict(inspect.signature(command, eval_str=True).parameters)
    del own["given"]
    parameters = {name: _build_parameter(name) for name in OptimizeConfig.model_fields} | own
    panels = {name: title for title, names in PANELS.items() for name in names}
    order = [*(name for name in panels if name in parameters), *(name for name in parameters if name not in panels)]
    set_parameters(call, [_put_in_panel(parameters[name], panels.get(name)) for name in order])
    return call


def _put_in_panel(parameter: inspect.Parameter, title: str | None) -> inspect.Parameter:
    """Have the help show an option in a group of options; in the last one where none is named."""
    kind, *details = get_args(parameter.annotation)
    details = [copy.copy(detail) for detail in details]
    for detail in details:
        detail.rich_help_panel = title
    return parameter.replace(annotation=Annotated[kind, *details])


def refuse_empty_paths(parameter: inspect.Parameter) -> inspect.Parameter:
    """Have the parser of a parameter refuse an empty path, which Python takes for the current directory."""
    named, *details = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else (None,)
    if not _holds_path(named):
        return parameter
    details = [copy.copy(detail) for detail in details]
    for detail in details:
        detail.parser = _parse_path
    return parameter.replace(annotation=Annotated[named, *details])


def _holds_path(annotation: Any) -> bool:
    return annotation is Path or any(map(_holds_path, get_args(annotation)))


def _parse_path(text: str) -> Path:
    if not text:
        raise typer.BadParameter("it is empty; name a file or a directory, the current one is '.'")
    return Path(text)


def refuse_empty(arguments: Mapping[str, Any]) -> None:
    """Refuse an option that was given without a value, as ``--study ""``, instead of taking its default.

    Args:
        arguments: the values by the names of their parameters.

    Raises:
        UsageError: naming the option.
    """
    for name, value in arguments.items():
        if (value == "" or (isinstance(value, list) and "" in value)) and name not in _MAY_BE_EMPTY:
            raise UsageError(f"--{name.replace('_', '-')} is empty; give a value, or leave the option out")


def set_parameters(function: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> None:
    """Have a function that takes any keyword say which it takes, where typer looks for it."""
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _build_parameter(name: str) -> inspect.Parameter:
    """Build the parameter of a field: None where it is not typed, since a file or a preset may say it then."""
    field = OptimizeConfig.model_fields[name]
    default = None if field.is_required() else field.default
    if isinstance(default, bool):
        shown = name if default else None
    else:
        shown = ", ".join(map(str, default if isinstance(default, tuple) else (default,)))
        shown = None if default is None else shown or None
    typed = _name_typed(field.annotation) | None
    option = _describe(name, show_default=shown or False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[typed, option],
    )


def _name_typed(annotation: Any) -> Any:
    """Return what a value is typed as: paths and texts one by one, lists as one word that the field parses."""
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        item = item.__origin__ if get_origin(item) is Annotated else item
        return str if item is int or get_origin(item) is Literal else list[item]  # type: ignore[valid-type]
    if get_origin(annotation) is Literal:
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if kinds else annotation
