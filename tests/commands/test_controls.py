"""No control character of a text that comes in reaches a terminal, a file or a pipe: it is shown as such."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from lpsearch.commands.lines import SafeConsole, dump_json_line
from lpsearch.commands.steps import clip
from lpsearch.wording import escape_controls
from tests.commands.conftest import Run
from tests.commands.terminal import start_on_terminal

MARK = "\x1b]0;owned\x07\x1b[31m\x9b5m\x7f\u202etxt"
"""Sets the title of the window, the colour of the text and its direction."""

SHOWN = r"\x1b]0;owned\x07\x1b[31m\x9b5m\x7f\u202etxt"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def write_plan(path: Path, **model: object) -> Path:
    """Write a plan of six layers whose fields are foreign."""
    fields = {"id": "tiny", "revision": None, "num_layers": 6, "fingerprint": "0" * 16, **model}
    document = {
        "schema_version": 1,
        "model": fields,
        "groups": [[0], [1, 2], [3], [4], [5]],
        "depth": 5,
        "depth_reduction": 1 - 5 / 6,
        "metrics": {},
        "provenance": {},
    }
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def talking_model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose every token is an escape sequence that sets a colour, a tab, and the end of a line."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("talking")
    shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
    vocabulary = {"word": 0} | {f"\x1b[{i}m\t\u202e{i}\n": i for i in range(1, 512)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="word"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("code", [*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
def test_every_control_character_is_shown(code: int) -> None:
    shown = escape_controls(chr(code))
    if chr(code) in "\n\t":
        assert shown == chr(code)
    else:
        assert shown == (rf"\u{code:04x}" if code > 255 else {13: r"\r"}.get(code, rf"\x{code:02x}"))
    assert escape_controls(shown) == shown


def test_other_text_is_left_alone() -> None:
    text = "naïve 日本語 עברית 🙂 \\x1b \xa0 tab\tline\n"
    assert escape_controls(text) == text
    assert escape_controls("one\ntwo\u2028", in_one_line=True) == r"one\ntwo\u2028"


@pytest.mark.parametrize("option", [None, "--quiet", "--json"])
def test_errors_show_control_characters(run_lpsearch: Run, tmp_path: Path, option: str | None) -> None:
    (tmp_path / MARK).mkdir()
    broken = tmp_path / f"{MARK}.json"
    broken.write_text("{", encoding="utf-8")
    for words in (
        ["plan", "show", broken],
        ["plan", "show", tmp_path / f"no-{MARK}\nINFO forged.json"],
        ["plan", "validate", write_plan(tmp_path / "plan.json"), "--model", MARK],
        ["optimize", "--model", f"owner/{MARK}"],
        ["optimize", "--model", "tiny", "--metric", MARK],
        ["optimize", "--model", "tiny", "--freeze", MARK],
        [MARK],
        ["optimize", f"--{MARK}"],
        ["evaluate", write_plan(tmp_path / "named.json", id=MARK), "--data", "self"],
        ["generate", write_plan(tmp_path / "named.json", id=MARK), "--prompt", "a"],
        ["report", tmp_path / MARK],
        ["dashboard", tmp_path / f"no-{MARK}"],
        ["plan", "pick", tmp_path / MARK, "--max-delta", 1],
    ):
        outcome = run_lpsearch(*words, *filter(None, [option]))
        assert outcome.exit_code in (1, 2), outcome.stderr
        assert not _CONTROL.search(outcome.stderr), outcome.stderr
        assert not _CONTROL.search(outcome.stdout)
        message = outcome.document["error"]["message"]
        assert SHOWN in escape_controls(message)
        lines = outcome.stderr.splitlines()
        assert len(lines) == 1, lines
        if option == "--json":
            assert json.loads(lines[0])["message"] == message
        else:
            assert r"\x1b]0;owned" in lines[0]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_search_shows_control_characters(
    run_lpsearch: Run, tiny_model_dir: Path, text_file: Path, tmp_path: Path, is_terminal: bool
) -> None:
    model, out = tmp_path / f"model-{MARK}", tmp_path / f"out-{MARK}"
    shutil.copytree(tiny_model_dir, model)
    arguments = [
        *("optimize", "--model", model, "--data", text_file, "--windows", 2, "--seq-len", 16, "--budget", 3),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu", "--out", out, "--study", MARK),
    ]
    if is_terminal:
        with start_on_terminal(*arguments, width=300) as terminal:
            assert terminal.wait() == 0
            output = terminal.output
        for character in set(MARK) & set("\x07\x9b\x7f\u202e"):
            assert character not in output
        assert "\x1b]0;" not in output
    else:
        outcome = run_lpsearch(*arguments)
        assert outcome.exit_code == 0, outcome.stderr
        output = outcome.stderr
        assert not _CONTROL.search(output + outcome.stdout)
        assert outcome.document["out"] == str(out)
    assert f"All of it is in {tmp_path}/out-{SHOWN}:" in output
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "\u202e" not in page, "a browser, too, obeys what reorders a line"
    assert "\x1b]0;" not in page
    assert SHOWN in page


@pytest.mark.parametrize("where", ["a pipe", "a terminal", "a quiet terminal"])
def test_generated_text_cannot_drive_the_terminal(
    run_lpsearch: Run, talking_model: Path, tmp_path: Path, where: str
) -> None:
    from lpsearch.models import load_model, resolve_source

    identity = load_model(resolve_source(str(talking_model)), device="cpu", dtype=_float32()).identity
    plan = write_plan(tmp_path / "plan.json", id=identity.id, fingerprint=identity.fingerprint)
    arguments = ["generate", plan, "--prompt", "word", "--max-new-tokens", 4, "--device", "cpu", "--dtype", "float32"]
    if where == "a pipe":
        outcome = run_lpsearch(*arguments)
        assert outcome.exit_code == 0, outcome.stderr
        output = outcome.stderr
        assert not _CONTROL.search(output)
        tokens = re.findall("\x1b\\[(\\d+)m\t\u202e\\1\n", outcome.document["text"])
        assert len(tokens) == 4, "the JSON holds the text itself"
    else:
        quiet = ["--quiet"] if where == "a quiet terminal" else []
        with start_on_terminal(*arguments, *quiet, width=300) as terminal:
            assert terminal.wait() == 0
            output = terminal.output
        assert "\u202e" not in output
        tokens = re.findall(r"\\x1b\[(\d+)m\s+\\u202e\1\s", output)
        assert len(tokens) == 4
        assert not any(f"\x1b[{token}m" in output for token in tokens if int(token) > 2), "no colour is obeyed"
    for token in tokens:
        assert re.search(rf"\\x1b\[{token}m\s+\\u202e{token}\s", output), "line ends and tabs stay"


def test_tables_and_displays_keep_their_width() -> None:
    stream = io.StringIO()
    console = SafeConsole(file=stream, width=24, force_terminal=False)
    table = Table()
    table.add_column(MARK)
    table.add_row(Text(MARK))
    table.add_row(MARK)
    console.print(table)
    console.print(clip(f"loading {MARK}", "bold", 20))
    lines = stream.getvalue().splitlines()
    assert not _CONTROL.search(stream.getvalue().replace("\n", ""))
    assert all(len(line) <= 24 for line in lines), lines
    assert lines[-1].startswith(r"loading \x1b]0;")


def test_a_line_of_json_has_no_control_character() -> None:
    line = dump_json_line({MARK: [MARK]})
    assert not _CONTROL.search(line)
    assert json.loads(line) == {MARK: [MARK]}


def _float32() -> object:
    import torch

    return torch.float32
