"""Train a small Qwen3 on the bytes of texts for some seconds, as one more trained model for exhaustive tables.

Exhaustive tables need models of 20 to 30 layers that a GPU runs hundreds of times a second, and few published models
are that small. This one reads bytes: its tokenizer has 256 bytes and a BOS token, which begins every window. The script
concatenates the files in a random order and trains on the first 95 %. The rest is held out: its first windows go to
``heldout.npz`` in the model's directory, which ``enumerate_front.py --data`` takes. ``--seconds`` does not include the
first step, which compiles.

    python studies/train_small.py --text /usr/lib/python3.12 --seconds 100 --out small-qwen3
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

if not __package__:  # run as a file: the package of the scripts is found from the directory above
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lpsearch.commands.loading import describe_device, resolve_device
from lpsearch.data import Windows
from lpsearch.errors import ConfigError, DataError, LpsearchError
from studies.windows_file import save_windows

BOS_ID = 256
_VOCAB_SIZE = 264  # a multiple of 8, which tensor cores need for full speed
_TRAIN_SHARE = 0.95
_WARMUP_SHARE = 0.05
_HEAD_DIM = 64
_HELDOUT_WINDOWS = (16, 512)
_SYNCHRONISE_EVERY = 10


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer whose token ids are the values of bytes, and which puts a BOS token before a text."""
    # Byte-level tokenizers write a byte as a visible character: its own if it has one, else one from 256 on.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    symbols = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    vocabulary = {symbol: byte for byte, symbol in symbols.items()} | {"<s>": BOS_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def build_model(*, num_layers: int, hidden_size: int, seed: int) -> Qwen3ForCausalLM:
    """Build a Qwen3 with random float32 weights and a vocabulary of bytes."""
    num_heads = max(2, hidden_size // _HEAD_DIM)
    config = Qwen3Config(
        vocab_size=_VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3 // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=_HEAD_DIM,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def read_bytes(paths: Sequence[Path], *, suffix: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return the bytes of texts as uint8: those to train on and those held out.

    Raises:
        DataError: if a path does not exist, or if the texts are too short.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"--text {path}: no such file or directory")
        files += sorted(path.rglob(f"*{suffix}")) if path.is_dir() else [path]
    order = np.random.default_rng(seed).permutation(len(files))
    data = b"\n".join(files[i].read_bytes() for i in order)
    num_train = int(_TRAIN_SHARE * len(data))
    if len(data) - num_train < math.prod(_HELDOUT_WINDOWS):
        raise DataError(f"--text: {len(data)} bytes in {len(files)} files; give at least 200 kB of text")
    array = np.frombuffer(data, dtype=np.uint8).copy()
    return torch.from_numpy(array[:num_train]), torch.from_numpy(array[num_train:])


def draw_batch(data: Tensor, *, batch_size: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """Return (batch, seq) tokens: BOS, then consecutive bytes from a random position."""
    starts = torch.randint(len(data) - seq_len + 2, (batch_size, 1), generator=generator, device=data.device)
    body = data[starts + torch.arange(seq_len - 1, device=data.device)].long()
    return F.pad(body, (1, 0), value=BOS_ID)


def compute_loss(model: Qwen3ForCausalLM, input_ids: Tensor) -> Tensor:
    """Return the mean loss in nats per byte, computed in bfloat16 on a GPU."""
    with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=input_ids.is_cuda):
        logits = model(input_ids=input_ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())


def train(
    model: Qwen3ForCausalLM,
    data: Tensor,
    *,
    seconds: float,
    batch_size: int,
    seq_len: int,
    learning_rate: float,
    seed: int,
) -> dict[str, Any]:
    """Train with AdamW for some seconds; :func:`compute_rate` has the schedule of the learning rate.

    Returns:
        The tokens, the steps, the seconds of the first step and of the others, and the mean loss of the last tenth of
        the steps.
    """
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=data.is_cuda)
    generator = torch.Generator(device=data.device).manual_seed(seed)
    losses: list[Tensor] = []
    first_step_s, began_at, share = 0.0, time.monotonic(), 0.0
    while share < 1 or not losses:
        loss = compute_loss(model, draw_batch(data, batch_size=batch_size, seq_len=seq_len, generator=generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not first_step_s:  # the first step has rate 0 and compiles
            loss.item()
            first_step_s, began_at = time.monotonic() - began_at, time.monotonic()
            continue
        losses.append(loss.detach())
        if len(losses) % _SYNCHRONISE_EVERY == 0:
            loss.item()  # waits, so that the device is never far behind the clock
        share = (time.monotonic() - began_at) / seconds
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * compute_rate(share)
    tail = losses[-max(1, len(losses) // 10) :]
    return {
        "train_tokens": len(losses) * batch_size * (seq_len - 1),
        "steps": len(losses),
        "train_nll": float(torch.stack(tail).mean()),
        "first_step_s": first_step_s,
        "train_s": time.monotonic() - began_at,
    }


def compute_rate(share: float) -> float:
    """Return the learning rate as a share of its maximum: a linear rise over 5 % of the time, then a cosine to 0.1."""
    if share < _WARMUP_SHARE:
        return share / _WARMUP_SHARE
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (share - _WARMUP_SHARE) / (1 - _WARMUP_SHARE)))


@torch.inference_mode()
def evaluate_heldout(model: Qwen3ForCausalLM, windows: Windows) -> float:
    """Return the mean loss over windows, in nats per byte."""
    device = model.device
    rows = torch.from_numpy(windows.input_ids.copy()).long()
    return sum(float(compute_loss(model, row[None].to(device))) for row in rows) / len(rows)


def build_heldout_windows(heldout: Tensor) -> Windows:
    """Return the first windows of the held-out bytes, each beginning with BOS."""
    num_windows, seq_len = _HELDOUT_WINDOWS
    body = heldout[: num_windows * (seq_len - 1)].view(num_windows, seq_len - 1).int()
    return Windows(F.pad(body, (1, 0), value=BOS_ID).cpu().numpy(), "held-out bytes of the training texts")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and save a model, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files or directories")
    parser.add_argument("--suffix", default=".py", help="suffix of the files to read in a directory (default: .py)")
    parser.add_argument("--seconds", type=float, required=True, help="how long to train")
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--batch", type=int, default=128, help="sequences in a step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="torch device")
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(_run(options)))
    except LpsearchError as error:
        print(f"train_small: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    if options.seconds <= 0 or min(options.layers, options.hidden, options.batch) < 1 or options.seq_len < 2:
        raise ConfigError("--seconds, --layers, --hidden and --batch must be positive, --seq-len at least 2")
    device = resolve_device(options.device)
    data, heldout = read_bytes(options.text, suffix=options.suffix, seed=options.seed)
    windows = build_heldout_windows(heldout)
    model = build_model(num_layers=options.layers, hidden_size=options.hidden, seed=options.seed).to(device)
    if device.type == "cuda":
        for layer in model.model.layers:  # one at a time, so that all share one compiled function
            layer.compile()
    result = train(
        model,
        data.to(device),
        seconds=options.seconds,
        batch_size=options.batch,
        seq_len=options.seq_len,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # a new shape would compile again
        heldout_nll = evaluate_heldout(model, windows)
    model.to(torch.bfloat16).save_pretrained(options.out)
    build_tokenizer().save_pretrained(options.out)
    save_windows(options.out / "heldout.npz", windows)
    return {
        "model": str(options.out),
        "layers": options.layers,
        "hidden": options.hidden,
        "parameters": model.num_parameters(),
        "train_bytes": len(data),
        "heldout_nll": heldout_nll,
        **result,
        "device": describe_device(device),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
