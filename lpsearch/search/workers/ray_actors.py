"""Workers as Ray actors, on one machine or many (Moritz et al., Ray: A Distributed Framework, OSDI 2018).

Ray places the actors, says when one has died, and starts those that wait as soon as a node joins. An actor loads its
model itself and keeps it; Ray restarts none and repeats no call, since the pool does both.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from lpsearch.errors import ConfigError, describe_error
from lpsearch.evaluation.losses import WindowLosses
from lpsearch.search.workers.evaluating import (
    Answer,
    BuildEvaluators,
    EvaluatingProcess,
    WorkerFailedError,
    WorkerReport,
    pack_builder,
    read_losses,
    read_report,
    settle,
)

__all__ = ["RayLauncher"]

CONNECT_TIMEOUT_S = 10.0

_Read = TypeVar("_Read")


class RayLauncher:
    """Starts workers as Ray actors.

    Where this process has not joined a Ray cluster yet, it does so here and leaves it in :meth:`close`.

    Args:
        build: builds what each evaluates with; importable on every machine, where lpsearch is installed too.
        address: of the cluster, ``auto`` for the one that this machine belongs to; None starts a Ray on this machine
            alone, and stops it in the end.
        num_workers: how many there are to be; those that find no room yet wait for a machine that joins. None takes as
            many as there is room for, now and later: one for every ``gpus_per_worker`` GPUs, or one on every machine.
        gpus_per_worker: GPUs of each; 0 for workers on CPUs.

    Raises:
        ConfigError: if Ray is not installed, the cluster cannot be reached or has no such GPUs, or the process is in
            another cluster.
    """

    def __init__(
        self,
        build: BuildEvaluators,
        *,
        address: str | None = None,
        num_workers: int | None = None,
        gpus_per_worker: int = 0,
    ) -> None:
        self._ray = _import_ray()
        self._packed = pack_builder(build)
        self._num_workers = num_workers
        self._gpus_per_worker = gpus_per_worker
        self._has_joined = not self._ray.is_initialized()
        if self._has_joined:
            self._join(address)
        else:
            self._check_joined(address)
        try:
            self._check_gpus()
            num_cpus = int(self._ray.cluster_resources().get("CPU", 1))
            # Ray lets an actor compute in as many threads as it has CPUs.
            share = 1 if gpus_per_worker else max(1, num_cpus // max(1, self.count_places()))
            self._actor_class = self._ray.remote(EvaluatingProcess).options(
                num_cpus=share,
                num_gpus=gpus_per_worker,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="DEFAULT" if gpus_per_worker else "SPREAD",
            )
        except BaseException:
            self.close()
            raise

    def count_places(self) -> int:
        """Return how many workers there may be now."""
        if self._num_workers is not None:
            return self._num_workers
        if self._gpus_per_worker:
            return int(self._ray.cluster_resources().get("GPU", 0)) // self._gpus_per_worker
        return sum(bool(node["Alive"]) for node in self._ray.nodes())

    def start(self, index: int) -> _RayWorker:
        """Start an actor, or have it wait for room; it then loads."""
        return _RayWorker(self._ray, self._actor_class.remote(self._packed))

    def close(self) -> None:
        """Leave the cluster, and stop it if it was started here."""
        if self._has_joined:
            self._ray.shutdown()

    def _join(self, address: str | None) -> None:
        own_only = {} if address else {"include_dashboard": False}
        try:
            _check_answers(address)
            self._ray.init(
                # Not None, which takes whatever cluster this machine last belonged to.
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **own_only,
            )
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise _build_refusal(address, error) from None

    def _check_joined(self, address: str | None) -> None:
        """Refuse another cluster than the one that this process has joined, since it can be in one at a time."""
        if address is None or address in ("auto", "local"):
            return
        joined: str = self._ray.get_runtime_context().gcs_address
        try:
            _check_answers(address)
            is_joined = _resolve(address) == _resolve(joined)
        except (OSError, ValueError) as error:
            raise _build_refusal(address, error) from None
        if not is_joined:
            raise ConfigError(
                f"--ray-address {address}: this process is in another Ray cluster, {joined}; call ray.shutdown() first"
            )

    def _check_gpus(self) -> None:
        most = max((int(node["Resources"].get("GPU", 0)) for node in self._ray.nodes() if node["Alive"]), default=0)
        if most < self._gpus_per_worker and (most or self._num_workers is None):
            raise ConfigError(
                f"--gpus-per-worker {self._gpus_per_worker}: no machine of the Ray cluster has so many GPUs (the most "
                f"is {most}); give fewer, 0 to evaluate on CPUs, or --workers to wait for a machine that joins"
            )


class _RayWorker:
    """One actor."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray = ray
        self._handle = handle
        self.ready: Future[WorkerReport] = self._follow(handle.load.remote(), read_report)

    def submit(self, name: str, plan_key: str, window_indices: Sequence[int]) -> Future[WindowLosses]:
        """Evaluate a plan; nothing else may be running on this worker."""
        return self._follow(self._handle.evaluate.remote(name, plan_key, list(window_indices)), read_losses)

    def end(self) -> None:
        """Have Ray kill the actor's process, in which nothing is to be saved."""
        self._ray.kill(self._handle)

    def _follow(self, reference: Any, read: Callable[[Answer], _Read]) -> Future[_Read]:
        """Return the future of a call's answer; an actor that dies has failed."""
        future: Future[_Read] = Future()
        reference.future().add_done_callback(lambda done: settle(future, partial(self._read, done, read)))
        return future

    def _read(self, done: Future[Answer], read: Callable[[Answer], _Read]) -> _Read:
        error = done.exception()
        if isinstance(error, self._ray.exceptions.RayError):
            raise WorkerFailedError(f"its actor ended: {describe_error(error)}")
        return read(done.result())


def _build_refusal(address: str | None, error: Exception) -> ConfigError:
    return ConfigError(
        f"--ray-address {address}: no Ray cluster answers there ({describe_error(error)}); start one with "
        "`ray start --head`, or leave the address out to use this machine alone"
    )


def _resolve(address: str) -> tuple[str, int]:
    """Return the IP address, as other machines see it, and the port of ``HOST:PORT``."""
    from ray import util

    own_ip: str = util.get_node_ip_address()  # type: ignore[no-untyped-call]
    host, _, port = address.rpartition(":")
    ip = socket.gethostbyname(host.strip("[]"))
    return own_ip if ip.startswith("127.") else ip, int(port)


def _check_answers(address: str | None) -> None:
    """Refuse an address at which nothing listens; Ray itself would try for minutes.

    Raises:
        OSError: if nothing does.
        ValueError: if it names no port.
    """
    if address is None or address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdecimal():
        raise ValueError("it is no HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _import_ray() -> Any:
    """Return Ray's module.

    Raises:
        ConfigError: naming the extra, if it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--executor ray needs Ray; install it with `pip install 'lpsearch[ray]'`") from None
    return ray
