"""The plugin where vLLM is absent: it imports, says which extra is missing, and stands among the entry points."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from lpsearch.errors import UsageError
from lpsearch.export import vllm_plugin

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed; tests/vllm registers for real")
def test_without_vllm_the_extra_is_named():
    with pytest.raises(UsageError, match=r"lpsearch\[vllm\]"):
        vllm_plugin.register()


def test_entry_point_is_the_function():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["lpsearch"].partition(":")
    assert getattr(import_module(module), function) is vllm_plugin.register
    assert "vllm" in project["optional-dependencies"]


def test_import_is_light():
    code = (
        "import sys, lpsearch.export.vllm_plugin as plugin\n"
        "assert plugin.__all__ == ['register']\n"
        "heavy = {'datasets', 'gguf', 'optuna', 'plotly', 'sqlalchemy', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=120, check=True)
