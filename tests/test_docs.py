"""What the documentation generates says what the code does, and its links lead somewhere. The build is `make docs`."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    spec = spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["docs_hooks"] = module
    spec.loader.exec_module(module)
    return module


def split_sections(markdown: str) -> dict[str, str]:
    """Split at headings: heading to what stands below it."""
    parts = re.split(r"^#+ (.+)$", markdown, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_is_listed_with_the_options_of_its_help(hooks: ModuleType) -> None:
    sections = split_sections(hooks.build_commands())
    for words in (["optimize"], ["profile"], ["plan", "pick"], ["models"]):
        done = subprocess.run(
            [sys.executable, "-m", "lpsearch", *words, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "200", "PATH": ""},
            cwd=ROOT,
        )
        offered = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", done.stdout)) - {"--help"}
        listed = set(re.findall(r"`(--[a-z-]+)`", sections[f"lpsearch {' '.join(words)}"]))
        assert listed <= offered
        # The help of an option may name another one, of this command or of no command.
        columns = {line.split()[1] for line in done.stdout.splitlines() if re.match(r"\W{1,4}--[a-z]", line)}
        assert columns - {"--help"} <= listed
    assert "`--staged` `--unstaged`" in sections["lpsearch optimize"]
    assert "`--sampler` `pairset`, `evolution`" in sections["lpsearch optimize"]
    assert "`DIR|PLAN`" in sections["lpsearch generate"]
    assert "| `--tp` `N` | `1` |" in sections["lpsearch profile"]
    assert "| `--prompt` `TEXT` | required |" in sections["lpsearch generate"]


def test_every_group_of_commands_is_listed(hooks: ModuleType) -> None:
    from lpsearch.commands.app import app

    listed = split_sections(hooks.build_commands())
    assert len(app.registered_groups) >= 2
    assert {f"lpsearch {group.name}" for group in app.registered_groups} <= set(listed)
    assert len(listed) >= len(app.registered_commands) + len(app.registered_groups)


def test_families_are_those_of_the_code(hooks: ModuleType) -> None:
    from lpsearch.models.traits import FAMILIES

    rows = re.findall(r"^\| (`.+`) \| yes \| (yes)? *\| (yes)? *\|$", hooks.build_families(), re.MULTILINE)
    names = [re.findall(r"`([^`]+)`", row[0]) for row in rows]
    assert list(dict.fromkeys(name[0] for name in names)) == list(FAMILIES)
    by_name = {", ".join(name): row[1:] for name, row in zip(names, rows, strict=True)}
    assert len(by_name) == len(rows)
    assert by_name["llama"] == ("yes", "yes")
    assert by_name["starcoder2"] == ("yes", "")
    assert by_name["mixtral"] == ("", "")
    assert by_name["gpt_neox, use_parallel_residual: true"] == ("", "")
    assert by_name["gpt_neox, use_parallel_residual: false"] == ("yes", "")


def test_every_field_of_the_plan_file_is_described(hooks: ModuleType) -> None:
    from lpsearch.plan import LatencyMetrics, ModelIdentity, Provenance, ProxyMetrics

    sections = split_sections(hooks.build_plan_fields())
    for model in (LatencyMetrics, ModelIdentity, ProxyMetrics, Provenance):
        rows = re.findall(r"^\| `(\w+)` \| .+ \| (?:yes)? *\| (.+) \|$", sections[model.__name__], re.MULTILINE)
        assert [row[0] for row in rows] == list(model.model_fields)
        assert all(row[1].strip() for row in rows)


@pytest.mark.parametrize(
    ("uri", "link", "expected"),
    [
        ("searching.md", "latency.md#the-model", "latency.md#the-model"),
        ("searching.md", "../studies/RESULTS.md#a", "results.md#a"),
        ("api/index.md", "../../lpsearch/errors.py", "../source/lpsearch/errors.py.md"),
        ("results.md", "LOG.md", "log.md"),
        ("contributing.md", "docs/searching.md", "searching.md"),
        ("index.md", "https://optuna.org", "https://optuna.org"),
    ],
)
def test_links_lead_where_they_lead_on_github(hooks: ModuleType, uri: str, link: str, expected: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    fence = f"```\n[a]({link})\n```"
    markdown = hooks.on_page_markdown(f"[a]({link})\n{fence}", page, None, None)
    assert markdown == f"[a]({expected})\n{fence}"


def test_a_link_to_no_file_is_a_warning(hooks: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="searching.md"))
    with caplog.at_level(logging.WARNING):
        hooks.on_page_markdown("[a](../lpsearch/no_such_module.py)", page, None, None)
    assert "which is no file of the repository" in caplog.text


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "studies/RESULTS.md", "studies/LOG.md"]
)
def test_relative_links_of_the_repositorys_own_pages_lead_to_files(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\(([^)\s#]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).is_file()]
    assert not missing
