"""Checkpoints of training, from which it goes on with the same bits."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpsearch.errors import LpsearchError, ResumeError

__all__ = ["Checkpoint", "find_checkpoint", "restore_optimizer", "save_checkpoint"]

_STEP_DIRECTORY = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """What training had reached.

    Attributes:
        identity: what it was training, of which nothing may change: settings, plan, model, text.
        state: in JSON's types.
        tensors: of the weights under training and the optimizer.
        best: the best weights so far.
    """

    identity: Mapping[str, Any]
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    best: Mapping[str, Tensor]


def save_checkpoint(
    directory: Path,
    step: int,
    *,
    identity: Mapping[str, Any],
    state: Mapping[str, Any],
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint, then delete the ones before it; a kill at any moment leaves one that is whole.

    Args:
        directory: for the checkpoints of one training.
        step: steps that are done.
        identity: see :class:`Checkpoint`.
        state: see :class:`Checkpoint`.
        trained: the weights under training, by name, in the optimizer's order.
        optimizer: with its state.
        best: see :class:`Checkpoint`.

    Raises:
        LpsearchError: if it cannot be written.
    """
    tensors = {f"weight.{name}": parameter.detach() for name, parameter in trained.items()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in values.items()}
    target = directory / f"step-{step:08d}"
    unfinished = target.with_suffix(".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / "state.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in best.items()}, unfinished / "best.safetensors")
        content = json.dumps({"identity": dict(identity), "state": dict(state)}, indent=2)
        (unfinished / "state.json").write_text(content, encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        unfinished.rename(target)
    except OSError as error:
        raise LpsearchError(
            f"{target}: the checkpoint cannot be written ({error}); make room or give another directory"
        ) from None
    for path in directory.iterdir():
        if _STEP_DIRECTORY.fullmatch(path.name.removesuffix(".unfinished")) and path != target:
            shutil.rmtree(path, ignore_errors=True)


def find_checkpoint(directory: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """Read the last whole checkpoint of a directory; None without one.

    Args:
        directory: for the checkpoints of one training.
        identity: what is about to be trained.

    Raises:
        ResumeError: if it was training something else, naming what differs, or cannot be read.
    """
    found = sorted(path for path in directory.glob("step-*") if _STEP_DIRECTORY.fullmatch(path.name))
    if not found:
        return None
    path = found[-1]
    try:
        content = json.loads((path / "state.json").read_text(encoding="utf-8"))
        known, state = content["identity"], content["state"]
        differences = [
            f"{name} {known.get(name)!r} there and {identity.get(name)!r} now"
            for name in sorted({*known, *identity})
            if known.get(name) != identity.get(name)
        ]
        if not differences:
            tensors, best = load_file(path / "state.safetensors"), load_file(path / "best.safetensors")
            return Checkpoint(known, state, tensors, best)
    except Exception as error:  # a damaged file fails in many ways
        raise ResumeError(
            f"{path}: the checkpoint cannot be read ({error}); delete the directory to train from the start"
        ) from None
    raise ResumeError(
        f"{path}: the checkpoint is of another training: {'; '.join(differences)}; give the same arguments to go on, "
        "or another directory to train from the start"
    )


def restore_optimizer(
    checkpoint: Checkpoint, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put the weights and the optimizer's state of a checkpoint back.

    Args:
        checkpoint: of the same training.
        trained: the weights under training, by name, in the optimizer's order.
        optimizer: of the same parameters.
    """
    for name, parameter in trained.items():
        parameter.data.copy_(checkpoint.tensors[f"weight.{name}"])
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", maxsplit=2)
            states.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
