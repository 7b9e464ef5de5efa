"""Database servers of Debian's packages, started for the tests on free ports of the loopback interface."""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

START_S = 120


def find_program(name: str) -> str | None:
    """Return a program of a server; Debian keeps some of them out of PATH, those of PostgreSQL by version."""
    places = (*Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), *Path("/usr/sbin").glob(name))
    return shutil.which(name) or next(map(str, sorted(places)), None)


class Server(ABC):
    """A database server with data of its own, that only this machine can connect to.

    Attributes:
        url: of a database that is there from the first.
    """

    def __init__(self, directory: Path, user: str, programs: dict[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.directory = directory
        self.user = user
        self.programs = programs
        self.url = self.build_url()
        self._numbers = count()

    @abstractmethod
    def build_url(self) -> str:
        """Return the URL of a database that is there from the first."""

    @abstractmethod
    def initialise(self) -> None:
        """Make the data of the server."""

    @abstractmethod
    def start(self) -> None:
        """Start the server, and wait until it answers."""

    @abstractmethod
    def stop(self) -> None:
        """End the server at once, with whatever connections it has."""

    def create_database(self) -> str:
        """Create an empty database; return its URL."""
        # The environment of `make test-vllm`, whose tests load this module too, has none.
        from sqlalchemy import create_engine, text

        name = f"study_{next(self._numbers)}"
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self.url.rpartition("/")[0] + f"/{name}"

    def run(self, program: str, *arguments: str) -> None:
        """Run one of the programs, as the user that the server runs as."""
        # Not captured: the server would keep a pipe open for as long as it lives.
        with self.open_log() as log:
            subprocess.run(
                [self.programs[program], *arguments],
                stdout=log,
                stderr=log,
                check=True,
                cwd=self.directory,
                timeout=START_S,
                **self.switch_user(),
            )

    def open_log(self):
        return (self.directory / "log").open("ab")

    def switch_user(self) -> dict[str, str]:
        return {"user": self.user} if os.geteuid() == 0 else {}


class Postgres(Server):
    """A PostgreSQL."""

    def build_url(self) -> str:
        return f"postgresql+psycopg://lpsearch@127.0.0.1:{self.port}/postgres"

    def initialise(self) -> None:
        data = str(self.directory / "data")
        self.run("initdb", "-D", data, "-U", "lpsearch", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")

    def start(self) -> None:
        settings = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.directory}"
        self.run("pg_ctl", "-D", str(self.directory / "data"), "-w", "-o", f"{settings} -c fsync=off", "start")

    def stop(self) -> None:
        self.run("pg_ctl", "-D", str(self.directory / "data"), "-m", "immediate", "-w", "stop")


class MariaDB(Server):
    """A MariaDB, which speaks the protocol of MySQL."""

    process: subprocess.Popen[bytes] | None = None

    def build_url(self) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/mysql"

    def initialise(self) -> None:
        data = f"--datadir={self.directory / 'data'}"
        self.run(
            "mariadb-install-db", "--no-defaults", data, "--auth-root-authentication-method=normal", "--skip-test-db"
        )

    def start(self) -> None:
        settings = {
            "datadir": self.directory / "data",
            "port": self.port,
            "bind-address": "127.0.0.1",
            "socket": self.directory / "socket",
            "pid-file": self.directory / "pid",
            "innodb-flush-log-at-trx-commit": 2,  # what was committed outlives the process, not the machine
            "character-set-server": "utf8mb4",
        }
        words = [f"--{name}={value}" for name, value in settings.items()]
        with self.open_log() as log:
            self.process = subprocess.Popen(
                [self.programs["mariadbd"], "--no-defaults", *words],
                stdout=log,
                stderr=log,
                cwd=self.directory,
                **self.switch_user(),
            )
        deadline = time.monotonic() + START_S
        while not self.answers():
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, "MariaDB did not start"
            time.sleep(0.1)

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except OSError:
            return False
        return True


def _choose_user(name: str) -> str:
    """Return the user that a server runs as: servers refuse to run as root."""
    if os.geteuid() != 0:
        return getpass.getuser()
    try:
        pwd.getpwnam(name)
    except KeyError:
        pytest.skip(f"run as root, and there is no user {name}")
    return name


@contextmanager
def run_server(kind: type[Server]) -> Iterator[Server]:
    """Run a server during a block; skip the test where its package, or what connects to it, is not installed."""
    driver, user, names = {
        Postgres: ("psycopg", "postgres", ("initdb", "pg_ctl")),
        MariaDB: ("pymysql", "mysql", ("mariadb-install-db", "mariadbd")),
    }[kind]
    pytest.importorskip(driver, reason=f"{driver} is not installed")
    programs = {name: find_program(name) for name in names}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} of {kind.__name__} are not on this machine")
    user = _choose_user(user)
    directory = Path(tempfile.mkdtemp(prefix=f"lpsearch-{kind.__name__.lower()}-"))
    try:
        shutil.chown(directory, user)
        server = kind(directory, user, {name: str(path) for name, path in programs.items()})
        server.initialise()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory)
