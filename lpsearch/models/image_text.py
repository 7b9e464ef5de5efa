"""Image-text models: the language model inside, by itself.

Gemma 3 from 4B up, Mistral 3 and others are a language model of a known family whose embeddings may be replaced by
those of an image. On text alone they compute what that language model computes, from the same modules.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from lpsearch.errors import FamilyError
from lpsearch.models.families import get_decoder
from lpsearch.models.quiet import quiet_transformers

__all__ = ["choose_auto_class", "extract_language_model", "find_text_config", "holds_language_model"]

logger = logging.getLogger(__name__)

_PLAIN_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Language models whose rotary embedding takes three positions of a token (M-RoPE; Qwen2-VL, arXiv 2409.12191), and the
plain types that they are where the three are equal, as in text."""

_OF_THE_OTHER_TYPE = frozenset({"model_type", "architectures", "transformers_version"})
_COMPARED_TOKENS = 12
_COMPARED_ULPS = 8


def find_text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the language model inside an image-text model, or a text model's own."""
    text_config = config.get_text_config(decoder=True)
    plain_type = _PLAIN_TYPES.get(text_config.model_type)
    if plain_type is None:
        return text_config
    fields = {name: value for name, value in text_config.to_dict().items() if name not in _OF_THE_OTHER_TYPE}
    fields["rope_parameters"] = {
        name: value for name, value in fields["rope_parameters"].items() if not name.startswith("mrope_")
    }
    return CONFIG_MAPPING[plain_type](**fields)


def holds_language_model(config: PretrainedConfig) -> bool:
    """Say whether a configuration is of a model of images and text around a causal language model of transformers."""
    text_type = type(find_text_config(config))
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and text_type in MODEL_FOR_CAUSAL_LM_MAPPING


def choose_auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that loads a model with this configuration."""
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or not holds_language_model(config)
    return AutoModelForCausalLM if is_causal else AutoModelForImageTextToText


def extract_language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the language model inside an image-text model, of the very same weights; any other model as it is.

    Raises:
        FamilyError: if it computes something else on text than inside the whole.
    """
    if not holds_language_model(model.config):
        return model
    decoder: Any = get_decoder(model)
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"), quiet_transformers():
        text_model: PreTrainedModel = build(find_text_config(model.config))
    own: Any = get_decoder(text_model)
    if type(own) is type(decoder):
        setattr(text_model, text_model.base_model_prefix, decoder)
        text_model.config = decoder.config
    elif decoder.config.model_type in _PLAIN_TYPES:
        own.load_state_dict(decoder.state_dict(), assign=True)
        own.rotary_emb = type(own.rotary_emb)(own.config).to(model.device)
        _compare(model, decoder, own)
    else:
        return model
    text_model.set_output_embeddings(model.get_output_embeddings())  # type: ignore[no-untyped-call]
    text_model.config.name_or_path = model.config.name_or_path
    text_model.generation_config = model.generation_config
    logger.warning(
        "%s is taken without what reads images: its language model, %s, is searched and exported as a text model",
        model.config.name_or_path or type(model).__name__,
        type(text_model).__name__,
    )
    return text_model


@torch.no_grad()
def _compare(model: PreTrainedModel, decoder: nn.Module, own: nn.Module) -> None:
    """Check that a decoder of the plain type gives what the decoder of an image-text model gives for some tokens.

    Raises:
        FamilyError: if they differ by more than rounding.
    """
    in_training = decoder.training
    generator = torch.Generator().manual_seed(0)
    vocab_size: int = own.config.vocab_size  # type: ignore[assignment, union-attr]
    input_ids = torch.randint(vocab_size, (1, _COMPARED_TOKENS), generator=generator).to(model.device)
    expected, actual = (
        module.eval()(input_ids=input_ids, use_cache=False).last_hidden_state.float() for module in (decoder, own)
    )
    decoder.train(in_training)
    own.train(in_training)
    allowed = _COMPARED_ULPS * torch.finfo(model.dtype).eps * expected.abs().max()
    difference = (actual - expected).abs().max()
    if not bool(difference <= allowed):
        raise FamilyError(
            f"model type {model.config.model_type}: its language model gives other hidden states than "
            f"{type(own).__name__} does with its weights (they differ by {float(difference):.3g}, expected at most "
            f"{float(allowed):.3g}), so it cannot be taken by itself; give a text model"
        )
