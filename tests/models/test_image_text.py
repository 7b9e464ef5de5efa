"""The language model inside an image-text model: loaded, and exported, as a text model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from lpsearch.errors import FamilyError, ModelError
from lpsearch.export import export_checkpoint, export_source, load_exported
from lpsearch.models import load_geometry, load_model, resolve_source
from lpsearch.models.families import check_family
from lpsearch.models.image_text import extract_language_model
from lpsearch.transform import applied_plan, fuse_plan
from tests.export.byte_tokenizer import write_byte_tokenizer
from tests.fusing import MIXED, compute_logits, relative_difference
from tests.tiny_models import build_tiny_config, build_tiny_model
from tests.tolerances import FLOAT32_FUSED

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

TOKENS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
QWEN_VISION: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"vision_config": VISION, "mm_tokens_per_image": 1, "image_token_index": 90}),
    "llava": ("llama", {"vision_config": {**VISION, "model_type": "clip_vision_model"}, "image_token_index": 90}),
    "mistral3": (
        "mistral",
        {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8}, "image_token_index": 90},
    ),
    "qwen2_vl": ("qwen2", {"vision_config": {**QWEN_VISION, "embed_dim": 16, "hidden_size": 32}, **TOKENS}),
    "qwen2_5_vl": ("qwen2", {"vision_config": {**QWEN_VISION, "out_hidden_size": 32}, **TOKENS}),
    "qwen3_vl": (
        "qwen3",
        {"vision_config": {**QWEN_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}, **TOKENS},
    ),
}


@pytest.fixture(params=MODELS)
def image_text(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Path]:
    """Build a tiny image-text model around a tiny language model, and save it."""
    family, options = MODELS[request.param]
    text_config = build_tiny_config(family, vocab_size=512)
    fields = text_config.to_dict()
    if request.param.startswith("qwen"):
        del fields["model_type"], fields["layer_types"], fields["sliding_window"]
        fields["rope_parameters"]["mrope_section"] = [1, 1, 2]
    config = CONFIG_MAPPING[request.param](text_config=fields, **options)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config).eval()
    inner = build_tiny_model(family, vocab_size=512)
    model.get_decoder().load_state_dict(inner.model.state_dict())
    model.lm_head.load_state_dict(inner.lm_head.state_dict())
    model.save_pretrained(tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    return model, tmp_path / "model"


def test_the_language_model_computes_what_the_whole_computes_on_text(
    image_text: tuple[PreTrainedModel, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, directory = image_text
    loaded = load_model(resolve_source(str(directory)), device="cpu", dtype=torch.float32)
    assert type(loaded.model).__name__.endswith("ForCausalLM")
    assert not any("vision" in name for name, _ in loaded.model.named_parameters())
    assert "without what reads images" in caplog.text
    assert torch.equal(compute_logits(loaded.model), compute_logits(model))
    check_family(loaded.model)
    assert load_geometry(str(directory)).num_hidden_layers == loaded.identity.num_layers == 6


def test_the_language_model_is_exported_as_a_text_checkpoint(
    image_text: tuple[PreTrainedModel, Path], tmp_path: Path
) -> None:
    model, directory = image_text
    with applied_plan(model, MIXED):
        expected = compute_logits(model)
    with pytest.raises(ModelError, match="is an image-text model; `export_checkpoint` writes the language model"):
        fuse_plan(model, MIXED)
    export_checkpoint(model, MIXED, tmp_path / "memory")
    export_source(resolve_source(str(directory)), MIXED, tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (tmp_path / "memory" / "model.safetensors").read_bytes() == written
    exported, _ = load_exported(tmp_path / "out", device="cpu", dtype=torch.float32)
    assert relative_difference(compute_logits(exported), expected) < FLOAT32_FUSED
    assert not any("vision" in name for name, _ in exported.named_parameters())


def test_a_language_model_that_computes_something_else_by_itself_is_refused() -> None:
    text = build_tiny_config("qwen2", vocab_size=512).to_dict()
    del text["model_type"], text["layer_types"], text["sliding_window"]
    text["rope_parameters"]["mrope_section"] = [1, 1, 2]
    options = {"vision_config": {**QWEN_VISION, "out_hidden_size": 32}, **TOKENS}
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["qwen2_5_vl"](text_config=text, **options))
    model.get_decoder().layers[2].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(FamilyError, match=r"qwen2_5_vl: its language model gives other hidden states than Qwen2Model"):
        extract_language_model(model)
