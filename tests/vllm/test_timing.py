"""``lpsearch profile --engine vllm`` builds the steps of several plans side by side. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.vllm.conftest import running


@pytest.mark.timeout(700)
def test_plans_are_timed_side_by_side(environment, tmp_path):
    result, log = tmp_path / "result.json", tmp_path / "log.txt"
    command = [sys.executable, "-m", "tests.vllm.time_plans", str(result)]
    with running(command, log=log, env=environment("plugin")) as process:
        try:
            code = process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            code = None
    assert code == 0, log.read_text(encoding="utf-8", errors="replace")[-3000:]
    found = json.loads(result.read_text(encoding="utf-8"))
    assert set(found) == {"decode", "prefill"}
    for measured in found.values():
        assert measured["num_kv_heads"] == {"unmodified": [2] * 4, "joined": [6, 2], "dropping": [4]}
        assert all(time_ms > 0 for times in measured["times"].values() for time_ms in times)
