"""PEFT on an exported directory: an adapter trains, saves and loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lpsearch.export import export_checkpoint
from tests.fusing import MIXED
from tests.tiny_models import build_left_padded_batch, build_tiny_model
from tests.tolerances import MERGED_LOGITS

peft = pytest.importorskip("peft", reason="needs peft: pip install lpsearch[recover]")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # its name before transformers 5.23
@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen3", "smollm3"])
def test_an_adapter_trains_saves_and_loads(family: str, tmp_path: Path) -> None:
    export_checkpoint(build_tiny_model(family), MIXED, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    batch = build_left_padded_batch()
    untouched = base(**batch).logits.detach()
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
    torch.testing.assert_close(model(**batch).logits, untouched)  # a new adapter adds nothing
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=batch["input_ids"], use_cache=False).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    expected = model(**batch).logits.detach()
    assert not torch.allclose(expected, untouched)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", trust_remote_code=True)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")(**batch).logits, expected)
    torch.testing.assert_close(
        model.merge_and_unload()(**batch).logits, expected, rtol=MERGED_LOGITS, atol=MERGED_LOGITS
    )
