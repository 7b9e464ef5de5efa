"""Windows that are sampled from the model itself (``--data self``).

The tokens are drawn from the model's own distribution p, unaltered: temperature 1, no top-k, no top-p. Then the mean of
log p(x_t | x_<t) - log q(x_t | x_<t) over the sampled tokens, the delta_nll of a plan's distribution q, is an unbiased
estimate of KL(p || q) a token, by the chain rule of the divergence. It needs no text and no download. The end-of-text
token is a token like any other here: stopping at it would condition p on something else, and windows have one length.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
from collections.abc import Callable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lpsearch.config import Split
from lpsearch.data.roomy_cache import build_roomy_cache
from lpsearch.data.shipped import find_shipped, name_sampled
from lpsearch.data.windows import Windows
from lpsearch.errors import ModelError
from lpsearch.models import fingerprint_model, fingerprint_parts
from lpsearch.models.cache import cache_directory
from lpsearch.models.memory import find_free_bytes
from lpsearch.models.placement import find_input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["estimate_sampling_bytes", "load_or_sample_windows", "sample_tokens", "sample_windows"]

logger = logging.getLogger(__name__)

_CPU_BATCH_SIZE = 32
_MAX_BATCH_SIZE = 8192
_SHARE_OF_FREE = 0.8
"""Of a GPU's free memory, for a batch."""


def load_or_sample_windows(
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_windows: int,
    seq_len: int,
    split: Split,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Windows:
    """Return the sampled windows of this model, seed and split, from this package or the user's cache where possible.

    Args:
        model: the unmodified model.
        tokenizer: its tokenizer, for the token that every window begins with.
        num_windows: number of windows.
        seq_len: tokens in a window, the first included.
        split: ``proxy`` or ``heldout``; the two are drawn from different seeds.
        seed: seed of the study.
        on_progress: called with steps done and steps in all.

    Raises:
        ModelError: if neither tokenizer nor model names a token to begin with.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    provenance = {"split": split, "seed": seed, "dtype": dtype, "fingerprint": fingerprint_model(model)}
    parts = fingerprint_parts(model, tokenizer)
    name = name_sampled(split=split, seed=seed, parts=parts, num_windows=num_windows, seq_len=seq_len)
    shipped, path = find_shipped(name), cache_directory() / "windows" / name
    input_ids = _load_cached(path if shipped is None else shipped, (num_windows, seq_len))
    if input_ids is None:
        logger.info("sampling %d %s windows of %d tokens from the model", num_windows, split, seq_len)
        input_ids = sample_windows(
            model=model,
            tokenizer=tokenizer,
            num_windows=num_windows,
            seq_len=seq_len,
            split=split,
            seed=seed,
            on_progress=on_progress,
        )
        _store(path, input_ids)
    return Windows(input_ids, "self", provenance)


def sample_windows(
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_windows: int,
    seq_len: int,
    split: Split,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.int32]:
    """Sample the windows of a seed and split, whatever is kept; see :func:`load_or_sample_windows`.

    Returns:
        Tokens, int32, ``(num_windows, seq_len)``.

    Raises:
        ModelError: if neither tokenizer nor model names a token to begin with.
    """
    return sample_tokens(
        model=model,
        first_token=_find_first_token(model, tokenizer),
        num_windows=num_windows,
        seq_len=seq_len,
        generator=_make_generator(seed, split),
        on_progress=on_progress,
    )


@torch.inference_mode()
def sample_tokens(
    *,
    model: PreTrainedModel,
    first_token: int,
    num_windows: int,
    seq_len: int,
    generator: torch.Generator,
    on_progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.int32]:
    """Sample sequences from a model by inverting its cumulative distribution.

    All uniform numbers are drawn first, on the CPU, one a window and position, so that the device and the batches
    change the result only through the rounding of the logits.

    Args:
        model: a causal language model in eval mode.
        first_token: token that every sequence begins with.
        num_windows: number of sequences.
        seq_len: tokens in a sequence, the first included.
        generator: CPU generator of the uniform numbers.
        on_progress: called with steps done and steps in all.

    Returns:
        Tokens, int32, ``(num_windows, seq_len)``.
    """
    uniforms = torch.rand((num_windows, seq_len - 1), generator=generator, dtype=torch.float64)
    batches = torch.split(uniforms, _choose_batch_size(model, seq_len))
    num_steps = len(batches) * (seq_len - 1)
    sampled = []
    for batch_index, numbers in enumerate(batches):
        # Tokens and numbers stay on the device, which is never waited for between two steps.
        tokens = torch.full((len(numbers), seq_len), first_token, dtype=torch.long, device=find_input_device(model))
        past_key_values: Any = build_roomy_cache(model.config, seq_len)
        for position in range(1, seq_len):
            outputs = model(
                input_ids=tokens[:, position - 1 : position], past_key_values=past_key_values, use_cache=True
            )
            past_key_values = outputs.past_key_values
            cumulative = outputs.logits[:, -1].double().softmax(dim=-1).cumsum(dim=-1)  # (batch, vocab)
            if position == 1:
                numbers = numbers.to(cumulative.device)
            # Scaled by the last value, which rounding leaves near 1; `right` skips tokens of probability zero.
            thresholds = numbers[:, position - 1 : position] * cumulative[:, -1:]
            drawn = torch.searchsorted(cumulative, thresholds, right=True)
            tokens[:, position] = drawn.squeeze(1).clamp(max=cumulative.shape[1] - 1)
            if on_progress is not None:
                on_progress(batch_index * (seq_len - 1) + position, num_steps)
        sampled.append(tokens.cpu())
    return torch.cat(sampled).numpy().astype(np.int32)


def _choose_batch_size(model: PreTrainedModel, seq_len: int) -> int:
    """Choose how many sequences are drawn at once. On a GPU a step takes as long for one as for hundreds."""
    device = find_input_device(model)
    if device.type != "cuda":
        return _CPU_BATCH_SIZE
    free_bytes = int(_SHARE_OF_FREE * find_free_bytes(device))
    return max(1, min(_MAX_BATCH_SIZE, free_bytes // estimate_sampling_bytes(model, seq_len)))


def estimate_sampling_bytes(model: PreTrainedModel, seq_len: int) -> int:
    """Estimate the memory that one sequence takes while it is sampled.

    That is its KV cache, a quarter of it again for what the attention of a layer copies, and its logits.

    Args:
        model: a causal language model.
        seq_len: tokens in a sequence.
    """
    config: Any = model.config.get_text_config(decoder=True)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache_bytes = 2 * config.num_hidden_layers * num_kv_heads * head_dim * seq_len * model.dtype.itemsize
    logits_bytes = config.vocab_size * (2 * model.dtype.itemsize + 3 * torch.float64.itemsize)
    return int(cache_bytes) * 5 // 4 + int(logits_bytes)


def _find_first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return BOS, or what stands in for it: models without one are trained on texts that follow an EOS."""
    config = model.config.get_text_config()
    candidates = (
        tokenizer.bos_token_id,
        getattr(config, "bos_token_id", None),
        tokenizer.eos_token_id,
        getattr(config, "eos_token_id", None),
    )
    for token in candidates:
        if isinstance(token, int):
            return token
    raise ModelError("--data self needs a BOS or EOS token to begin with and the tokenizer has none; give --data FILE")


def _make_generator(seed: int, split: Split) -> torch.Generator:
    """Return a generator whose stream differs between the splits of one seed, and between seeds."""
    digest = hashlib.sha256(f"{split}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _load_cached(path: Traversable, shape: tuple[int, int]) -> npt.NDArray[np.int32] | None:
    try:
        input_ids: npt.NDArray[np.int32] = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s cannot be read (%s); sampling the windows again", path, error)
        return None
    if input_ids.shape != shape or input_ids.dtype != np.int32:
        logger.warning("%s holds other windows than its name says; sampling them again", path)
        return None
    return input_ids


def _store(path: Path, input_ids: npt.NDArray[np.int32]) -> None:
    """Write the cache file whole or not at all; a cache that cannot be written only costs time later."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            np.save(stream, input_ids)
        temporary.replace(path)
    except OSError as error:
        logger.warning("sampled windows were not cached: %s", error)
        with contextlib.suppress(OSError):
            temporary.unlink()
