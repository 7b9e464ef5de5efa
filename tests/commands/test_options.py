"""The options of ``optimize`` are the fields of its configuration: what is typed arrives, what is not stays unsaid."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from lpsearch.commands.options import with_config_options
from lpsearch.config import OptimizeConfig, resolve_config

TYPED = {
    "allow": ("joins,drop-mlp", ("joins", "drop-mlp")),
    "model": ("m", "m"),
    "budget": ("7", 7),
    "data": ("self@2", ("self@2",)),
    "heldout": ("a.txt", ("a.txt",)),
    "windows": ("3", 3),
    "seq_len": ("64", 64),
    "max_group": ("4", 4),
    "metric": ("kl", "kl"),
    "recover": ("refit", "refit"),
    "objective": ("latency", "latency"),
    "sampler": ("random", "random"),
    "seed": ("9", 9),
    "device": ("cpu", "cpu"),
    "device_map": ("auto", "auto"),
    "cache_location": ("host", "host"),
    "executor": ("ray", "ray"),
    "workers": ("2", 2),
    "gpus_per_worker": ("1", 1),
    "ray_address": ("auto", "auto"),
    "dtype": ("float32", "float32"),
    "freeze": ("0,2-3", (0, 2, 3)),
    "latency": ("p.json", "p.json"),
    "study": ("s", "s"),
    "out": ("o", Path("o")),
    "storage": ("sqlite://", "sqlite://"),
    "timeout": ("1.5", 1.5),
}
"""What is typed of every option that takes one value, and what the configuration holds then."""


def parse(*words: str) -> dict[str, Any]:
    app = typer.Typer()

    @app.command()
    @with_config_options
    def command(given: dict[str, Any], more: Annotated[int, typer.Option()] = 5) -> dict[str, Any]:
        return {**given, "more": more}

    parsed: dict[str, Any] = app(args=list(words), standalone_mode=False)
    return parsed


def test_what_is_typed_arrives_as_the_configuration_has_it() -> None:
    words = [word for name, (text, _) in TYPED.items() for word in ("--" + name.replace("_", "-"), text)]
    words += ["--enqueue", "a.json", "--enqueue", "b", "--unstaged", "--trust-remote-code", "--more", "6"]
    words += ["--data", "b.txt", "--worst-case", "--workload", "decode:1x64", "--workload", "decode:8x64@2"]
    given = parse(*words)
    assert given.pop("more") == 6
    expected = {name: value for name, (_, value) in TYPED.items()}
    expected |= {"enqueue": (Path("a.json"), Path("b")), "staged": False, "trust_remote_code": True}
    expected |= {"data": ("self@2", "b.txt"), "worst_case": True, "workload": ("decode:1x64", "decode:8x64@2")}
    assert given.keys() == expected.keys() == OptimizeConfig.model_fields.keys()
    assert resolve_config(command_line=given).values == OptimizeConfig(**expected)


def test_what_is_not_typed_is_not_given() -> None:
    assert parse() == {"more": 5}


@pytest.mark.parametrize("words", [["--metric", "bits"], ["--budget", "0"], ["--seq-len", "1"], ["--windows", "x"]])
def test_impossible_values_are_refused_by_the_name_of_their_option(words: list[str]) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse(*words)
    assert words[0] in caught.value.format_message()


def test_help_shows_every_default_and_choice() -> None:
    command = [sys.executable, "-m", "lpsearch", "optimize", "--help"]
    environment = {"COLUMNS": "250", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows = {match[1]: line for line in done.stdout.splitlines() if (match := re.match(r"\W{1,4}(--[a-z-]+)", line))}
    for name, field in OptimizeConfig.model_fields.items():
        row = rows["--" + name.replace("_", "-")]
        assert field.description[:60] in row
        if name == "staged":
            assert "--unstaged" in row
            assert "[default: (staged)]" in row
        elif field.is_required() or field.default is None or field.default is False or field.default == ():
            assert "[default" not in row
        else:
            shown = field.default[0] if name in ("allow", "data") else field.default
            assert f"[default: ({shown})]" in row
    assert "<pairset|evolution|nsga2|tpe|random|window>" in rows["--sampler"]


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_help_is_shown_on_a_terminal_that_knows_ascii_alone(columns: int) -> None:
    command = [sys.executable, "-m", "lpsearch", "optimize", "--help"]
    environment = {"COLUMNS": str(columns), "PATH": "", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert "Usage: lpsearch optimize" in done.stdout.decode("ascii")
    assert done.stderr == b""


@pytest.mark.parametrize("words", [["optimize", "--out"], ["generate", "plan.json", "--prompt"], ["models"]])
def test_an_argument_that_is_not_utf8_is_wrong_usage(words: list[str]) -> None:
    command = [os.fsencode(sys.executable), b"-m", b"lpsearch", *map(str.encode, words), b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"is not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["error"]["exit_code"] == 2
