"""Plans, profiles and fronts that anybody may have written: read, or refused with a message, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lpsearch.data.texts import resolve_text
from lpsearch.errors import LpsearchError
from lpsearch.front_file import FRONT_NAME, FrontFile, load_front_file
from lpsearch.kinds import list_measured_kinds
from lpsearch.latency.model import LatencyModel
from lpsearch.latency.profile import LatencyProfile, load_profile
from lpsearch.models.sources import resolve_source
from lpsearch.picking import pick_plan
from lpsearch.plan import Plan, build_plan_document, build_plan_schema, load_plan, parse_plan
from lpsearch.wording import describe_changes, describe_layers, describe_repair
from tests.hostile import FRONT, PLAN, PROFILE, broken_bytes, changed_documents

SCHEMA = jsonschema.Draft202012Validator(build_plan_schema())

LONGEST_MESSAGE = 4000
"""Characters of a message that a person can still read; a file must not choose how long it is."""


def read_plan(path: Path) -> None:
    """Read a plan and do with it what commands do before they load its model."""
    plan = load_plan(path)
    document = build_plan_document(plan)
    SCHEMA.validate(document)
    assert build_plan_document(parse_plan(json.loads(json.dumps(document, allow_nan=False)))) == document
    describe_layers(plan), describe_changes(plan), describe_repair(plan, path)
    assert Plan.from_key(plan.key) == plan
    assert plan.metadata is not None
    with suppress(LpsearchError):
        resolve_source(plan.metadata.model.id, revision=plan.metadata.model.revision)
    for measured in filter(None, (plan.metadata.metrics.proxy, plan.metadata.metrics.heldout)):
        for kind in list_measured_kinds(measured):
            with suppress(LpsearchError):
                resolve_text(kind.spec, split="proxy")


def read_profile(path: Path) -> None:
    """Read a profile and estimate the unmodified model and a pair by it."""
    profile = load_profile(path)
    assert LatencyProfile.model_validate(profile.model_dump(mode="json")) == profile
    num_layers = profile.geometry.num_layers
    try:
        model = LatencyModel(profile)
        for plan in (Plan.baseline(num_layers), Plan.from_joins(num_layers, range(0, num_layers - 1, num_layers))):
            metrics = model.build_metrics(plan)
            json.dumps(metrics.model_dump(mode="json"), allow_nan=False)
    except LpsearchError:
        pass


def read_front(path: Path) -> None:
    """Read a front, pick of it, and look where it points."""
    file = load_front_file(path.parent)
    assert file is not None
    assert FrontFile.model_validate(file.model_dump(mode="json")) == file
    pick_plan(file.front, metric=file.metric or "nll", objective=file.objective, max_loss=0.5)
    for point in file.front:
        place = PurePosixPath(point.plan)
        assert not place.is_absolute()
        assert list(place.parts[:-1]) in ([], ["plans"])
        assert ".." not in place.parts


READERS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "plan": (read_plan, PLAN),
    "profile": (read_profile, PROFILE),
    "front": (read_front, FRONT),
}


def check(path: Path, content: bytes, read: Callable[[Path], None]) -> None:
    """Read a file; it may be refused, in words that can be shown."""
    path.write_bytes(content)
    message = None
    try:
        read(path)
    except LpsearchError as error:
        message = str(error)
    assert message is None or len(str(path)) < len(message) < len(str(path)) + LONGEST_MESSAGE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that all examples share."""
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("kind", READERS)
def test_what_the_fuzzing_starts_from_is_valid(place: Path, kind: str) -> None:
    read, valid = READERS[kind]
    path = place / FRONT_NAME
    path.write_text(json.dumps(valid), encoding="utf-8")
    read(path)


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_changed_documents(place: Path, kind: str, data: st.DataObject) -> None:
    read, valid = READERS[kind]
    content = json.dumps(data.draw(changed_documents(valid)))
    check(place / FRONT_NAME, content.encode(), read)


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_broken_bytes(place: Path, kind: str, data: st.DataObject) -> None:
    read, valid = READERS[kind]
    check(place / FRONT_NAME, data.draw(broken_bytes(valid)), read)
