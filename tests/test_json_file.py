"""Files that come in: what cannot be read, or can be read in two ways, is an error that says so."""

from __future__ import annotations

import pytest

from lpsearch import load_plan
from lpsearch.config import parse_layer_list
from lpsearch.errors import ConfigError, LpsearchError, PlanError, StudyError
from lpsearch.front_file import load_front_file
from lpsearch.json_file import MAX_BYTES, load_json
from lpsearch.latency.profile import load_profile
from lpsearch.search import StudyStore
from lpsearch.search.schema import studies_table

HOSTILE = {
    "nested": "[" * 1_000_000 + "]" * 1_000_000,
    "digits": '{"schema_version": ' + "9" * 5_000 + "}",
    "twice": '{"schema_version": 1, "groups": [[0]], "groups": [[0, 1]]}',
    "constant": '{"schema_version": NaN}',
    "cut": '{"schema_version": 1, "groups": [[0',
    "latin": b'{"schema_version": "caf\xe9"}',
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("load", [load_plan, load_profile, lambda path: load_front_file(path.parent)])
def test_hostile_files_are_refused_by_name(tmp_path, name, load):
    path = tmp_path / "front.json"
    content = HOSTILE[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LpsearchError, match=r"front\.json") as caught:
        load(path)
    assert isinstance(caught.value, PlanError | ConfigError | StudyError)
    assert len(str(caught.value)) < 1_000


def test_a_key_given_twice_is_named(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(HOSTILE["twice"])
    with pytest.raises(PlanError, match="'groups' is given twice"):
        load_plan(path)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "plan.json"
    with path.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)  # a file of zeros that takes no room on the disk
    with pytest.raises(ValueError, match="more than 64 MiB"):
        load_json(path)


def test_ordinary_json_comes_back(tmp_path):
    path = tmp_path / "some.json"
    path.write_text('{"a": [1, 2.5, null, "ö"], "b": {"a": 1}}', encoding="utf-8")
    assert load_json(path) == {"a": [1, 2.5, None, "ö"], "b": {"a": 1}}


@pytest.mark.parametrize("settings", ["{", "[]", '{"metric": "nll", "metric": "kl"}', "[" * 100_000])
def test_damaged_settings_of_a_study_are_named(tmp_path, settings):
    with StudyStore(f"sqlite:///{tmp_path}/study.db", study_name="demo") as store:
        store.save_settings({"metric": "nll"})
        with store.begin_transaction() as connection:
            connection.execute(studies_table.update().values(settings=settings))
        with pytest.raises(StudyError, match=r"study\.db: the settings of study 'demo'"):
            store.load_settings()


@pytest.mark.parametrize("text", ["0-999999999999", "9" * 5_000, "7-3", "1-", "x", "²"])
def test_layers_that_no_model_has_are_refused_before_they_take_memory(text):
    with pytest.raises(ValueError, match="layer"):
        parse_layer_list(text)
