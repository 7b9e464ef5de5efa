"""A password that came in a URL is shown and kept by no command, whatever goes wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.conftest import Run
from tests.report.conftest import search_formula

HALVES = ("Hunter2", "Tr0ub4dor")
"""Of the password; half of it is a secret too."""

PASSWORD = "".join(HALVES)

PLACE = "127.0.0.1:1/db"
"""Nobody listens there."""

URLS = [
    f"postgresql+psycopg://me:{PASSWORD}@{PLACE}",
    f"postgresql://me:{PASSWORD}@{PLACE}",
    f"postgres://me:{PASSWORD}@{PLACE}",
    f"postgres://me:{'@'.join(HALVES)}@{PLACE}",
    f"postgres://me:{'@'.join(HALVES)}/x@{PLACE}",
    f"postgres://me:{'%40'.join(HALVES)}@{PLACE}",
    f"postgresql://me@{PLACE}?password={PASSWORD}",
    f"postgresql://{PLACE}?user=me&password={'@'.join(HALVES)}",
    f"postgresql://{PLACE}?passfile=/{PASSWORD}",
    f"postgresql://me:x@127.0.0.1:{PASSWORD}/db",
    f"postgresql://me:{PASSWORD}@127.0.0.1:port/db",
    f"mysql+pymysql://me:{PASSWORD}@{PLACE}",
    f"nosuch://me:{PASSWORD}@{PLACE}",
    f"me:{PASSWORD}@{PLACE}",
    f"host=127.0.0.1 password={PASSWORD}",
]


def check_that_nothing_tells(directory: Path, *texts: str) -> None:
    """Look for either half of the password in texts, and in the names and the bytes of all files of a directory."""
    for text in texts:
        assert not [half for half in HALVES if half in text], text
    for path in directory.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [half for half in HALVES if half in str(path) or half.encode() in content], path


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("speaks", ["--json", "--quiet", ""])
def test_storage_that_cannot_be_had(
    run_lpsearch: Run, tiny_model_dir: Path, text_file: Path, tmp_path: Path, url: str, speaks: str
) -> None:
    search_formula(tmp_path, budget=2)
    config = tmp_path.parent / f"{tmp_path.name}.toml"
    config.write_text(f'storage = "{url}"\n', encoding="utf-8")
    optimize = ["optimize", "--model", tiny_model_dir, "--data", text_file, "--latency", "off", "--device", "cpu"]
    for arguments in (
        [*optimize, "--out", tmp_path / "new", "--storage", url],
        [*optimize, "--out", tmp_path / "new", "--config", config],
        ["report", tmp_path, "--storage", url],
        ["dashboard", tmp_path, "--port", 0, "--storage", url],
    ):
        outcome = run_lpsearch(*arguments, *filter(None, [speaks]))
        assert outcome.exit_code in (1, 2), outcome.stderr
        assert "Traceback" not in outcome.stderr
        assert "storage" in outcome.document["error"]["message"] or "127.0.0.1" in outcome.document["error"]["message"]
        check_that_nothing_tells(tmp_path, outcome.stdout, outcome.stderr)
    config.unlink()


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize"],
        ["optimize", "--model"],
        ["optimize", "--model", "x", "--latency"],
        ["optimize", "--model", "x", "--budget"],
        ["optimize", "--model", "x", "--data"],
        ["report"],
        ["report", "."],
        ["dashboard"],
        ["dashboard", ".", "--port"],
        ["evaluate"],
        ["evaluate", "x.json"],
        ["export"],
        ["export", "x.json", "y"],
        ["generate"],
        ["profile"],
        ["profile", "--model"],
        ["models"],
        ["plan", "show"],
        ["plan", "validate"],
        ["plan", "diff", "x.json"],
        ["plan", "pick"],
        ["plan", "schema"],
        ["cache", "show"],
        ["cache", "clear"],
        [],
    ],
    ids=" ".join,
)
def test_a_url_in_the_wrong_place(
    run_lpsearch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Every command is given the URL where it takes something else, or nothing."""
    monkeypatch.chdir(tmp_path)
    for url in URLS[:9]:
        outcome = run_lpsearch(*arguments, url)
        assert outcome.exit_code in (1, 2)
        assert "Traceback" not in outcome.stderr
        check_that_nothing_tells(tmp_path, outcome.stdout, outcome.stderr)


def test_a_configuration_that_is_not_text(run_lpsearch: Run, tmp_path: Path) -> None:
    config = tmp_path.parent / f"{tmp_path.name}.toml"
    config.write_text(f'model = "x"\nstorage = ["{URLS[0]}"]\n', encoding="utf-8")
    outcome = run_lpsearch("optimize", "--config", config)
    config.unlink()
    assert outcome.exit_code == 2
    assert "--storage" in outcome.stderr
    check_that_nothing_tells(tmp_path, outcome.stdout, outcome.stderr)


@pytest.mark.parametrize("port", ["port", "54 32", "5432x"])
def test_a_port_that_is_no_number_is_wrong_usage(run_lpsearch: Run, tmp_path: Path, port: str) -> None:
    search_formula(tmp_path, budget=2)
    outcome = run_lpsearch("report", tmp_path, "--storage", f"postgresql://me@127.0.0.1:{port}/db")
    assert outcome.exit_code == 2
    assert outcome.document["error"]["type"] == "ConfigError"
    assert "port is not a number" in outcome.document["error"]["message"]
