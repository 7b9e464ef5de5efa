"""A study on a real PostgreSQL: searched, then served by the command."""

from __future__ import annotations

import getpass
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.commands.conftest import Run
from tests.dashboards.serving import fetch, wait_for_address


def find_binary(name: str) -> str | None:
    """Return a program of PostgreSQL; Debian keeps them out of PATH, by version."""
    return shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """Start a PostgreSQL on the loopback interface, with data of its own that nobody else can connect to."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    initdb, pg_ctl = find_binary("initdb"), find_binary("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not on this machine")
    user = getpass.getuser()
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = "postgres"
        try:
            pwd.getpwnam(user)
        except KeyError:
            pytest.skip("run as root, and there is no user postgres")
    directory = Path(tempfile.mkdtemp(prefix="lpsearch-postgres-"))
    shutil.chown(directory, user)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def run(*command: str) -> None:
        options = {"user": user} if os.geteuid() == 0 else {}
        # Not captured: the server would keep a pipe open for as long as it lives.
        with (directory.parent / f"{directory.name}.log").open("ab") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True, cwd=directory, timeout=60, **options)

    data = str(directory / "data")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={directory} -c fsync=off"
    try:
        run(initdb, "-D", data, "-U", "lpsearch", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")
        run(pg_ctl, "-D", data, "-w", "-o", settings, "start")
        try:
            yield f"postgresql+psycopg://lpsearch@127.0.0.1:{port}/postgres"
        finally:
            run(pg_ctl, "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(directory)
        (directory.parent / f"{directory.name}.log").unlink()


def test_a_study_on_postgresql_is_served(
    run_lpsearch: Run,
    start_lpsearch: Callable[..., subprocess.Popen],
    postgres_url: str,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "study"
    storage = postgres_url.replace("lpsearch@", "lpsearch:secret@")  # it asks for none
    searched = run_lpsearch(
        *("optimize", "--model", tiny_model_dir, "--data", text_file, "--windows", 3, "--seq-len", 24),
        *("--latency", "off", "--dtype", "float32", "--device", "cpu"),
        *("--out", out, "--storage", storage, "--budget", 6),
    )
    assert searched.exit_code == 0, searched.stderr
    assert not (out / "study.db").exists()
    front = searched.document["front"]

    process = start_lpsearch("dashboard", out, "--storage", storage, "--port", 0)
    url = wait_for_address(process)
    shown = fetch(url + "lpsearch/study.json")
    assert shown["state"] == "done"
    assert shown["message"].startswith("6 plans")
    with urlopen(url, timeout=30) as page:
        assert f"plan-{len(front) - 1}" in page.read().decode()
    study = fetch(url + "api/studies/1")
    assert len(study["trials"]) == 6
    assert study["objective_names"] == ["depth_reduction", "perplexity"]
    assert study["note"]["body"].count("\n| ") == len(front) + 2
    hidden = storage.replace("secret", "***")
    command = f"lpsearch dashboard {out} --storage '{hidden}' --study {searched.document['study']}"
    assert f"`{command}`" in study["note"]["body"]
    assert [one["id"] for one in study["plotly_graph_objects"]] == ["lpsearch-front"]
    artifacts = {one["filename"]: one["artifact_id"] for one in study["artifacts"]}
    assert {f"plans/{name}" for name in artifacts} == {point["plan"] for point in front}
    for name, artifact_id in artifacts.items():
        with urlopen(f"{url}artifacts/1/{artifact_id}", timeout=30) as stored:
            assert stored.read() == (out / "plans" / name).read_bytes()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["study"] == searched.document["study"]
