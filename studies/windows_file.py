"""Tokenise a text once and keep its windows in a file, so that other machines read tokens instead of text.

Versions of transformers differ in how they read the tokenizer of a GGUF file. If several machines evaluate a model, let
one of them write the windows and copy the file to the others. A file has the arrays ``input_ids`` int32 (windows,
seq_len) and ``spec`` (a name for the text, e.g. ``wikitext2:validation``).

    python studies/windows_file.py --model smollm2-135m --data wikitext2 --windows 16 --seq-len 512 --out valid.npz
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lpsearch.commands.outputs import check_output_file
from lpsearch.data import Windows, build_windows
from lpsearch.errors import ConfigError, DataError, LpsearchError
from lpsearch.models import LoadedModel, load_model, resolve_source

__all__ = ["get_windows", "load_windows", "save_windows"]


def save_windows(path: Path, windows: Windows) -> None:
    """Write a windows file."""
    np.savez_compressed(path, input_ids=windows.input_ids, spec=np.array(windows.spec))


def load_windows(path: Path, *, num_windows: int | None = None, seq_len: int | None = None) -> Windows:
    """Read a windows file.

    Args:
        path: the ``.npz`` file, or an ``.npy`` file of the tokens alone, which go by the name of the file.
        num_windows: how many windows to take, from the first; None takes all.
        seq_len: how many tokens of each window to take, from the first; None takes all.

    Raises:
        DataError: for a file that is missing, has another form, or holds fewer windows or tokens.
    """
    try:
        if path.suffix == ".npy":
            input_ids, spec = np.load(path, allow_pickle=False), path.stem
        else:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                input_ids, spec = np.asarray(archive["input_ids"]), str(archive["spec"])
    except FileNotFoundError:
        raise DataError(f"{path}: no such windows file; make one with studies/windows_file.py") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a windows file ({error}); expected arrays input_ids and spec") from None
    if input_ids.ndim != 2 or input_ids.dtype.kind not in "iu" or min(input_ids.shape) < 1 or input_ids.min() < 0:
        raise DataError(
            f"{path}: input_ids is {input_ids.dtype}{list(input_ids.shape)}; expected tokens (windows, seq_len)"
        )
    wanted = (num_windows or input_ids.shape[0], seq_len or input_ids.shape[1])
    if wanted[0] > input_ids.shape[0] or not 2 <= wanted[1] <= input_ids.shape[1]:
        raise DataError(
            f"{path}: holds {input_ids.shape[0]} windows of {input_ids.shape[1]} tokens, asked for {wanted[0]} of "
            f"{wanted[1]}; ask for no more windows or tokens, and for at least two tokens"
        )
    return Windows(input_ids[: wanted[0], : wanted[1]], spec)


def get_windows(data: str, loaded: LoadedModel, *, num_windows: int | None, seq_len: int | None) -> Windows:
    """Return the windows of ``--data``: those of a windows file, or of a text as for ``lpsearch optimize``.

    Args:
        data: an ``.npz`` or ``.npy`` file, or a text as ``lpsearch optimize --data`` takes it.
        loaded: the model that will evaluate them.
        num_windows: how many; needed for a text.
        seq_len: tokens in each; needed for a text.

    Raises:
        ConfigError: for a text without the number of windows or of tokens.
        DataError: if the windows do not exist, or hold tokens that the model does not have.
    """
    if not data.endswith((".npz", ".npy")):
        if num_windows is None or seq_len is None:
            raise ConfigError(f"--data {data}: a text needs --windows and --seq-len as well")
        return build_windows(
            data, tokenizer=loaded.tokenizer, num_windows=num_windows, seq_len=seq_len, model=loaded.model
        )
    windows = load_windows(Path(data), num_windows=num_windows, seq_len=seq_len)
    vocab_size = int(loaded.model.get_input_embeddings().weight.shape[0])
    if int(windows.input_ids.max()) >= vocab_size:
        raise DataError(f"{data}: has token {windows.input_ids.max()}, but {loaded.source.id} embeds only {vocab_size}")
    return windows


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a windows file, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="alias, hub id, directory or .gguf file")
    parser.add_argument("--data", required=True, help="as for lpsearch optimize")
    parser.add_argument("--split", choices=["proxy", "heldout"], default="proxy", help="which split of wikitext2")
    parser.add_argument("--windows", type=int, required=True, help="number of windows")
    parser.add_argument("--seq-len", type=int, required=True, help="tokens in a window")
    parser.add_argument("--spec", help="name of the text; default: lpsearch's own name for it")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(_run(options)))
    except LpsearchError as error:
        print(f"windows_file: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace) -> dict[str, Any]:
    if options.out.suffix != ".npz":
        raise ConfigError(f"--out {options.out}: name an .npz file")
    check_output_file(options.out)
    loaded = load_model(resolve_source(options.model), device="cpu", dtype=torch.float32)
    windows = build_windows(
        options.data,
        tokenizer=loaded.tokenizer,
        num_windows=options.windows,
        seq_len=options.seq_len,
        split=options.split,
        model=loaded.model,
    )
    windows = Windows(windows.input_ids, options.spec or windows.spec)
    save_windows(options.out, windows)
    return {
        "windows_file": str(options.out),
        "model": loaded.source.id,
        "spec": windows.spec,
        "windows": windows.num_windows,
        "seq_len": windows.seq_len,
        "sha256": windows.sha256,
    }


if __name__ == "__main__":
    sys.exit(main())
