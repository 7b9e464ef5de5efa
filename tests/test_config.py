"""Configuration: precedence, presets, and the message for each kind of mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lpsearch.config import OptimizeConfig, load_preset, parse_layer_list, resolve_config, slug_of_model
from lpsearch.errors import ConfigError


def test_command_line_beats_file_beats_preset_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('windows = 5\nseed = 7\n"max-group" = 3\n', encoding="utf-8")
    resolved = resolve_config(
        command_line={"model": "smollm2-135m", "seed": 9, "windows": None, "data": None}, config_file=file
    )
    assert resolved.values.seed == 9  # command line
    assert resolved.values.windows == 5  # file, although the preset names it too
    assert resolved.values.max_group == 3
    assert resolved.values.data == ("self",)  # preset
    assert resolved.values.budget == OptimizeConfig.model_fields["budget"].default
    assert resolved.explicit == {"model", "seed", "windows", "max_group"}


def test_a_model_without_a_preset_takes_the_defaults() -> None:
    resolved = resolve_config(command_line={"model": "llama2-7b", "budget": 200})
    assert (resolved.values.data, resolved.values.windows, resolved.values.seq_len) == (("wikitext2",), 16, 2048)
    assert load_preset("../presets/smollm2-135m") == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no model was named"),
        ({"model": "m", "budget": 0}, "--budget: Input should be greater than or equal to 1, got 0"),
        ({"model": "m", "max_group": 1}, "--max-group"),
        ({"model": "m", "sampler": "magic"}, "--sampler"),
        ({"model": "m", "allow": "joins,dops"}, "--allow: 'dops' is none of joins, drops"),
        ({"model": "m", "freeze": "1-"}, "'1-' is no layer"),
        ({"model": "m", "colour": 1}, "colour is no setting of a configuration file; known: model, budget"),
        (
            {"model": "m", "fresh": True},
            "fresh cannot be set in a configuration file; give --fresh on the command line",
        ),
        (
            {"model": "m", "dry_run": True},
            "dry-run cannot be set in a configuration file; give --dry-run on the command",
        ),
        ({"model": "m", "objective": "latency", "latency": "off"}, "--objective latency needs a latency"),
    ],
)
def test_mistakes_are_named(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve_config(command_line=given)


def test_unreadable_configuration_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such"):
        resolve_config(command_line={"model": "m"}, config_file=tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("seed = = 1", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.toml: not a readable TOML file"):
        resolve_config(command_line={"model": "m"}, config_file=tmp_path / "bad.toml")


def test_layer_lists() -> None:
    assert parse_layer_list("0, 1,28-29") == (0, 1, 28, 29)
    assert parse_layer_list("") == ()
    for text in ("a", "3-1", "-1", "1--2"):
        with pytest.raises(ValueError, match="no layer"):
            parse_layer_list(text)


def test_slugs() -> None:
    assert slug_of_model("llama2-7b") == "llama2-7b"
    assert slug_of_model("meta-llama/Llama-2-7b-hf") == "Llama-2-7b-hf"
    assert slug_of_model("some/dir/Model.Q4_1.gguf") == "Model.Q4_1"


def test_one_text_may_be_named_without_a_list(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('data = "a.txt"\nheldout = ["b.txt", "c.txt@2"]\nworst-case = true\n', encoding="utf-8")
    values = resolve_config(command_line={"model": "m"}, config_file=file).values
    assert (values.data, values.heldout, values.worst_case) == (("a.txt",), ("b.txt", "c.txt@2"), True)


@pytest.mark.parametrize("data", ["[]", '""', '["a.txt", ""]', "3"])
def test_data_that_names_no_text_is_refused(tmp_path: Path, data: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"data = {data}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="--data"):
        resolve_config(command_line={"model": "m"}, config_file=file)


def test_drops_are_compared_by_latency_unless_depth_is_named():
    drops = {"model": "m", "allow": "joins, drops"}
    values = resolve_config(command_line=drops).values
    assert (values.allow, values.objective) == (("joins", "drop-attention", "drop-mlp"), "latency")
    assert resolve_config(command_line={**drops, "objective": "depth", "latency": "off"}).values.objective == "depth"
    assert resolve_config(command_line={"model": "m", "allow": "joins"}).values.objective == "depth"
    with pytest.raises(ConfigError, match="--allow with drops needs a latency"):
        resolve_config(command_line={**drops, "latency": "off"})
    with pytest.raises(ConfigError, match=r"--allow: .*'heads' is none of joins, drops"):
        resolve_config(command_line={**drops, "allow": "joins,heads"})
