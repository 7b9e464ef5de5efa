"""Sample the windows that come with this package: those of the packaged models' presets, for ``--data self``.

It writes ``lpsearch/data/sampled_windows/``. Run it again where a preset, a packaged model or the sampling has changed,
or where the pinned transformers reads the tokenizer of a packaged model in another way; a test says so.

    python studies/packaged_windows.py [--model smollm2-135m]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import lpsearch.data
from lpsearch.config import Split, load_preset
from lpsearch.data import Windows
from lpsearch.data.sampling import sample_windows
from lpsearch.data.shipped import ShippedWindows, list_shipped, name_sampled
from lpsearch.models import fingerprint_parts, list_aliases, load_model, resolve_source
from lpsearch.versions import read_versions

DIRECTORY = Path(lpsearch.data.__file__).parent / "sampled_windows"
SEED = 0
SPLITS: tuple[Split, ...] = ("proxy", "heldout")


def write_windows(alias: str, directory: Path) -> list[ShippedWindows]:
    """Sample the windows of a packaged model's preset, by split, and write them.

    Args:
        alias: of the model.
        directory: where to.
    """
    preset = load_preset(alias)
    num_windows, seq_len = preset["windows"], preset["seq_len"]
    loaded = load_model(resolve_source(alias), device="cpu", dtype=torch.float32)
    parts = fingerprint_parts(loaded.model, loaded.tokenizer)
    entries = []
    for split in SPLITS:
        name = name_sampled(split=split, seed=SEED, parts=parts, num_windows=num_windows, seq_len=seq_len)
        tokens = sample_windows(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            num_windows=num_windows,
            seq_len=seq_len,
            split=split,
            seed=SEED,
        )
        np.save(directory / name, tokens)
        entries.append(
            ShippedWindows(
                file=name,
                model=alias,
                split=split,
                seed=SEED,
                windows=num_windows,
                seq_len=seq_len,
                parts=parts,
                sha256=Windows(tokens, "self").sha256,
                dtype="float32",
                versions=read_versions(),
            )
        )
    return entries


def main() -> None:
    """Sample the windows of every packaged model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    packaged = [alias.name for alias in list_aliases() if alias.kind == "package"]
    parser.add_argument("--model", choices=packaged, help="sample those of this model alone, and keep the others")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory to write")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    wanted = [arguments.model] if arguments.model else packaged
    kept = [entry for entry in list_shipped() if entry.model not in wanted] if arguments.model else []
    entries = [*kept, *(entry for alias in wanted for entry in write_windows(alias, out))]
    entries.sort(key=lambda entry: packaged.index(entry.model))
    index = json.dumps([entry.model_dump() for entry in entries], indent=2)
    (out / "index.json").write_text(index + "\n", encoding="utf-8")
    for stale in {file.name for file in out.glob("self-*.npy")} - {entry.file for entry in entries}:
        (out / stale).unlink()
    print(json.dumps({"out": str(out), "files": len(entries)}))


if __name__ == "__main__":
    main()
