"""A Ray cluster whose machines come and go, on this machine's CPUs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lpsearch.errors import ConfigError
from lpsearch.plan import Plan
from lpsearch.search.workers import RayLauncher, WorkerPool
from tests.search.workers.scripted import NUM_LAYERS, await_log, make_builder, read_log, release
from tests.search.workers.test_failures import await_workers

ray = pytest.importorskip("ray", reason="Ray is not installed; `pip install 'lpsearch[ray]'`")


@contextmanager
def start_cluster() -> Iterator[Any]:
    """Start a cluster of one machine with one CPU."""
    from ray.cluster_utils import Cluster

    if ray.is_initialized():  # a cluster that another file of tests left running
        ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Return a cluster of one machine with one CPU, to which machines may be added."""
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Any]:
    with start_cluster() as cluster:
        yield cluster


@pytest.fixture
def still_cluster(shared_cluster: Any) -> Iterator[Any]:
    """Return a cluster of one machine with one CPU, which stays as it is; at the end, this process leaves it."""
    yield shared_cluster
    ray.shutdown()


@pytest.mark.parametrize("num_workers", [None, 2])
def test_a_machine_that_joins_is_given_a_worker(cluster, tmp_path, num_workers):
    build = make_builder(tmp_path, {1: "wait"})
    with WorkerPool(RayLauncher(build, address=cluster.address, num_workers=num_workers)) as pool:
        assert pool.num_slots == 1
        slow, other = pool.submit(Plan.from_joins(NUM_LAYERS, (1,)), [0]), Plan.from_joins(NUM_LAYERS, (2,))
        (pid,) = await_log(tmp_path, slow_plan())
        waiting = pool.submit(other, [0])
        cluster.add_node(num_cpus=1)
        await_workers(pool, 2)
        assert waiting.result(timeout=60)
        assert await_log(tmp_path, other) != [pid]
        release(tmp_path)
        assert slow.result(timeout=60)
    assert not ray.is_initialized(), "the cluster is left"


def test_the_plan_of_a_machine_that_leaves_is_evaluated_on_another(cluster, tmp_path):
    leaving = cluster.add_node(num_cpus=1)
    with WorkerPool(RayLauncher(make_builder(tmp_path, {1: "wait"}), address=cluster.address)) as pool:
        await_workers(pool, 2)
        futures = [pool.submit(Plan.from_joins(NUM_LAYERS, joins), [0]) for joins in ((1,), (1, 5))]
        await_log(tmp_path, Plan.from_joins(NUM_LAYERS, (1, 5)))
        cluster.remove_node(leaving)
        release(tmp_path)
        for future in futures:
            assert future.result(timeout=120)
        assert pool.num_slots == 1
    assert {plan for _, plan, what in read_log(tmp_path) if what == "ended"} == {
        Plan.from_joins(NUM_LAYERS, joins) for joins in ((1,), (1, 5))
    }


def test_gpus_that_no_machine_has_are_refused(still_cluster, tmp_path):
    with pytest.raises(ConfigError, match=r"--gpus-per-worker 2: no machine .* \(the most is 0\)"):
        RayLauncher(make_builder(tmp_path), address=still_cluster.address, gpus_per_worker=2)
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nowhere"])
def test_a_cluster_that_does_not_answer_is_named(address):
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(ConfigError, match=f"--ray-address {address}: no Ray cluster answers there"):
        RayLauncher(dict, address=address)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere"])
def test_a_cluster_that_does_not_answer_is_named_within_another_one(still_cluster, address):
    ray.init(address=still_cluster.address)
    with pytest.raises(ConfigError, match=f"--ray-address {address}: no Ray cluster answers there"):
        RayLauncher(dict, address=address)
    assert ray.is_initialized(), "this process stays where it was"


def test_another_cluster_than_that_of_this_process_is_refused(still_cluster, tmp_path):
    ray.init(address=still_cluster.address)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--ray-address {address}: this process is in another Ray cluster, "):
            RayLauncher(dict, address=address)
    own = "127.0.0.1:" + still_cluster.address.rpartition(":")[2]
    for same in (still_cluster.address, own, "auto"):
        with WorkerPool(RayLauncher(make_builder(tmp_path), address=same)) as pool:
            assert pool.num_slots == 1


def slow_plan():
    return Plan.from_joins(NUM_LAYERS, (1,))
