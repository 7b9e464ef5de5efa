"""What the weight files of a model directory hold, and what of it the loaded model took.

Transformers makes up weights that the files lack, and passes over what they hold beyond the model; both stand only in a
report that scrolls past. Here the first is an error, and so is the second where it changes what the rest means: the
scales of quantised weights. Other weights of the decoder that nothing reads are warned of by name.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lpsearch.errors import ModelError, describe_error

__all__ = [
    "StoredTensor",
    "check_loading",
    "describe_unlike_layers",
    "list_weight_files",
    "name_some",
    "read_stored_tensors",
    "refuse_unscaled",
]

logger = logging.getLogger(__name__)

_WEIGHTS_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_SCALED_FLOATS = ("F8", "F6", "F4")
"""How the names of floating dtypes begin that hold a value only together with a scale."""

_INTEGERS = ("I8", "U8", "I16", "I32", "I64")

_SCALE_NAME = re.compile(
    r"(^|[._])(weight_scale(_inv|_2)?|scale_inv|scales|input_scale|qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_packed"
    r"|weight_zero_point|zero_point)$|quant_state"
)
"""Names that only quantised checkpoints have: FP8, compressed-tensors, GPTQ, AWQ, bitsandbytes."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it.

    Attributes:
        dtype: safetensors' name of its dtype, e.g. ``BF16``.
        shape: its shape.
    """

    dtype: str
    shape: tuple[int, ...]


def list_weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that transformers reads in a directory: the single one, or those of the index.

    Raises:
        ModelError: if there are none, the index is damaged, or a file that it names is not there.
    """
    single, index = directory / _WEIGHTS_NAME, directory / _INDEX_NAME
    if single.is_file():
        return [single]
    if not index.is_file():
        raise _describe_missing_files(directory)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [directory / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index}: not an index of safetensors files: {describe_error(error)}; fetch it again"
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{directory}: {len(missing)} of the {len(files)} files that {_INDEX_NAME} names are not there, e.g. "
            f"{missing[0]}; fetch the model again"
        )
    return files


def read_stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Read the headers of the weight files of a directory.

    Returns:
        Every tensor by its name in the files.

    Raises:
        ModelError: as :func:`list_weight_files`, or if a file is damaged.
    """
    tensors = {}
    for file in list_weight_files(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    view = opened.get_slice(name)
                    tensors[name] = StoredTensor(view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged: {describe_error(error)}; fetch it again") from error
    return tensors


def refuse_unscaled(directory: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse float8 and integer weights of a model whose configuration does not say how they are scaled.

    Raises:
        ModelError: naming some of them.
    """
    narrow = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype.startswith(_SCALED_FLOATS) or (tensor.dtype in _INTEGERS and name.endswith(".weight"))
    ]
    if narrow:
        raise ModelError(
            f"{directory}: {len(narrow)} weights are stored as {tensors[narrow[0]].dtype}, e.g. {name_some(narrow)}, "
            "and config.json has no quantization_config that says how they are scaled; give the unquantised model, or "
            "a .gguf file, which is dequantised"
        )


def check_loading(
    where: Path,
    info: Mapping[str, Any],
    *,
    stored: Mapping[str, StoredTensor] | None = None,
    num_layers: int | None = None,
    decoder: str = "",
) -> None:
    """Check transformers' own account of what it loaded.

    Args:
        where: the directory or file, for messages.
        info: what ``from_pretrained(..., output_loading_info=True)`` returned.
        stored: the tensors of the files.
        num_layers: number of decoder layers of the model.
        decoder: name of the decoder within the model. Unread weights of other parts, e.g. a vision tower, are no
            matter of a warning.

    Raises:
        ModelError: if weights are quantised, missing, or of another shape than the model's, naming some of them.
    """
    unread = sorted(info.get("unexpected_keys", ()))
    scales = [name for name in unread if _SCALE_NAME.search(name)]
    if scales:
        raise ModelError(
            f"{where}: the weights are quantised: {len(scales)} scales or packed weights are in the files, e.g. "
            f"{name_some(scales)}, and config.json has no quantization_config that says how to use them; give the "
            "unquantised model, or a .gguf file, which is dequantised"
        )
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        others = f", and the files hold {name_some(unread)} instead" if unread else ""
        raise ModelError(
            f"{where}: {len(missing)} weights are missing, e.g. {name_some(missing)}{others}; fetch the model again, "
            "with the configuration that belongs to it"
        )
    _refuse_other_shapes(where, info, stored or {})
    ours = [name for name in unread if name.startswith((f"{decoder}.", "lm_head.", "embed_out.")) or not decoder]
    if ours:
        logger.warning("%s", _describe_unread(where, ours, num_layers))
    if len(ours) < len(unread):
        rest = [name for name in unread if name not in set(ours)]
        logger.info("%s: %d weights outside the decoder are not used, e.g. %s", where, len(rest), name_some(rest))


def name_some(names: Iterable[str], limit: int = 3) -> str:
    """Name up to three things, one of each kind: names that differ in their numbers alone are of one kind."""
    of_kind = {_NUMBER.sub("*", name): name for name in reversed(list(names))}
    return ", ".join(list(reversed(of_kind.values()))[:limit])


def describe_unlike_layers(where: Path, tensors: Mapping[str, StoredTensor], kinds: Iterable[str] = ()) -> str | None:
    """Say which weights differ in shape from those in the same place of most other layers.

    Args:
        where: the directory, for the message.
        tensors: the tensors of its files.
        kinds: names of weights, to look at these and their like only.

    Returns:
        The message; None if all layers are alike.
    """
    wanted = {_NUMBER.sub("*", name) for name in kinds}
    shapes_of_kind: dict[str, dict[tuple[int, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, tensor in tensors.items():
        kind = _NUMBER.sub("*", name)
        if kind in wanted or (not wanted and "layers.*" in kind):
            shapes_of_kind[kind][tensor.shape].append(name)
    for names_of_shape in shapes_of_kind.values():
        usual = max(names_of_shape, key=lambda shape: len(names_of_shape[shape]))
        for shape, names in names_of_shape.items():
            if shape != usual:
                return (
                    f"{where}: its layers are of unlike size: {names[0]} has shape {_show(shape)}, in the others "
                    f"{_show(usual)} is usual; lpsearch takes models whose layers are all of one size"
                )
    return None


def _refuse_other_shapes(where: Path, info: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> None:
    """Refuse weights that do not have the model's shape.

    Raises:
        ModelError: naming one, its shape and the expected one.
    """
    mismatched = sorted(info.get("mismatched_keys", ()))
    if not mismatched:
        return
    name, shape, expected = mismatched[0]
    raise ModelError(
        describe_unlike_layers(where, stored, [entry[0] for entry in mismatched])
        or f"{where}: {len(mismatched)} weights do not fit the configuration: {name} has shape {_show(shape)}, "
        f"expected {_show(expected)}; fetch the model again, with the configuration that belongs to it"
    )


def _describe_unread(where: Path, names: list[str], num_layers: int | None) -> str:
    """Say which weights of the decoder the model leaves out, and why it may."""
    numbers = [int(match.group()) for name in names if (match := _NUMBER.search(name))]
    beyond = sorted({number for number in numbers if num_layers is not None and number >= num_layers})
    if beyond:
        reason = f"config.json says num_hidden_layers {num_layers}, and the files hold layers up to {beyond[-1]}"
    elif all(name.endswith(".bias") for name in names):
        reason = "config.json switches these biases off (attention_bias, mlp_bias or the like)"
    else:
        reason = "config.json describes a model without them"
    return (
        f"{where}: {len(names)} weights in the files are not used, e.g. {name_some(names)}: {reason}; if this is not "
        "the config.json that belongs to them, losses are those of another model"
    )


def _describe_missing_files(directory: Path) -> ModelError:
    """Make the error of a directory without weights that transformers would read."""
    names = sorted(path.name for path in directory.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES) and name != "training_args.bin"]
    found = [name for name in names if name.endswith(".safetensors")]
    if found:
        return ModelError(
            f"{directory}: it has {', '.join(found[:3])}, and neither {_WEIGHTS_NAME} nor {_INDEX_NAME}, which says "
            "what is in which file; fetch the model again, or save it with `save_pretrained`"
        )
    if pickles:
        return ModelError(
            f"{directory}: its weights are pickled ({', '.join(pickles[:3])}), and pickles, which can run any code, "
            "are not loaded; if you trust the file, convert it once: `AutoModelForCausalLM.from_pretrained(DIRECTORY, "
            "use_safetensors=False).save_pretrained(NEW_DIRECTORY)`, and copy the tokenizer's files there"
        )
    return ModelError(
        f"{directory}: there are no weights: expected {_WEIGHTS_NAME} or {_INDEX_NAME}; fetch the model again"
    )


def _show(shape: Iterable[int]) -> str:
    """Return a shape in words, e.g. ``64 x 32``."""
    return " x ".join(str(size) for size in shape)
