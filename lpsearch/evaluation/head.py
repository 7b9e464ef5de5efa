"""A causal language model's output head, run apart from its layers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lpsearch.errors import FamilyError
from lpsearch.models.forwards import replaced_forwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast

__all__ = ["OutputHead", "run_decoder"]

_CHECKED_TOKENS = 8


class OutputHead:
    """Turns last hidden states into logits, with whatever the family does to them (soft-capping, scaling).

    Every causal language model of transformers is a decoder, ``base_model``, and a few lines of its own that turn
    hidden states into logits. Those lines run, with the decoder replaced, rather than a copy of them a family. So the
    logits of a whole batch, by far the largest tensor at vocabularies of 256k, need never exist at once.

    Attributes:
        vocab_size: logits of a position.

    Args:
        model: the causal language model, with or without a plan.
        input_ids: (batch, seq), on the model's device; a few tokens of the first window are run to check the head.

    Raises:
        FamilyError: if the head needs more than the last hidden states.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        """Learn the decoder's kind of output."""
        self._model = model
        input_ids = input_ids[:1, :_CHECKED_TOKENS]
        with torch.no_grad():
            expected = model(input_ids=input_ids, use_cache=False).logits
            self._decoder_output = _run_decoder(model, input_ids)
            logits = self(cast(Tensor, self._decoder_output.last_hidden_state)).to(expected.device)
        self.vocab_size = int(expected.shape[-1])
        if not torch.equal(logits.isnan(), expected.isnan()) or not torch.allclose(
            logits.float(), expected.float(), rtol=1e-2, atol=1e-2, equal_nan=True
        ):
            raise FamilyError(
                f"{type(model).__name__}: its output head gives other logits when it is run apart from its "
                "layers, so lpsearch cannot evaluate it; supported families are listed in the README"
            )

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return logits, (batch, seq, vocab), in the model's dtype.

        Args:
            hidden_states: last hidden states, (batch, seq, hidden).
        """
        output = dataclasses.replace(cast(Any, self._decoder_output), last_hidden_state=hidden_states)
        placeholder = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
        with replaced_forwards([self._model.base_model], [lambda *args, **kwargs: output]):
            return cast(Tensor, self._model(input_ids=placeholder, use_cache=False).logits)


def run_decoder(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Run embedding, layers and final norm.

    Args:
        model: the causal language model.
        input_ids: (batch, seq).

    Returns:
        Last hidden states, (batch, seq, hidden).
    """
    return cast(Tensor, _run_decoder(model, input_ids).last_hidden_state)


def _run_decoder(model: PreTrainedModel, input_ids: Tensor) -> BaseModelOutputWithPast:
    return cast("BaseModelOutputWithPast", model.base_model(input_ids=input_ids, use_cache=False))
