"""Fixed windows of tokens, on which every plan is evaluated."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsearch.errors import StudyError
from lpsearch.kinds import TextKind, describe_kinds, dump_kinds, parse_dumped_kinds

__all__ = ["Windows"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and what they are.

    Attributes:
        input_ids: int32, ``(windows, seq_len)``, read-only.
        spec: what the tokens are, in full, e.g. ``wikitext2:validation``.
        provenance: what tells these windows from others of the same specification, in JSON's types: the half-open
            range of tokens within the text, or seed, dtype and fingerprint of the model that they were sampled from;
            of several kinds of text, ``kinds`` lists that of each.
        kinds: the kinds of text, interleaved as :mod:`lpsearch.kinds` says; where none are given, the only one.
    """

    input_ids: npt.NDArray[np.int32]
    spec: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[TextKind, ...] = ()

    def __post_init__(self) -> None:
        """Check the shape and freeze the tokens.

        Raises:
            ValueError: unless there is at least one window of at least two tokens, and as many of every kind.
        """
        if self.input_ids.ndim != 2 or self.input_ids.shape[0] < 1 or self.input_ids.shape[1] < 2:
            raise ValueError(f"windows must have shape (windows >= 1, seq_len >= 2), got {self.input_ids.shape}")
        if not self.kinds:
            object.__setattr__(self, "kinds", (TextKind(self.spec),))
        if self.input_ids.shape[0] % len(self.kinds):
            raise ValueError(f"{self.input_ids.shape[0]} windows are not as many of each of {len(self.kinds)} kinds")
        input_ids = np.ascontiguousarray(self.input_ids, dtype=np.int32)
        if input_ids is self.input_ids:
            input_ids = input_ids.copy()
        input_ids.setflags(write=False)
        object.__setattr__(self, "input_ids", input_ids)

    @classmethod
    def interleave(cls, parts: Sequence[Windows], weights: Sequence[float]) -> Windows:
        """Join windows of several kinds, as many of each; those of a single one stay as they are.

        Args:
            parts: the windows of each kind.
            weights: of the kinds, in the same order.
        """
        if len(parts) == 1:
            return parts[0]
        kinds = tuple(TextKind(part.spec, weight) for part, weight in zip(parts, weights, strict=True))
        rows = np.stack([part.input_ids for part in parts], axis=1)  # (windows of a kind, kinds, seq_len)
        return cls(
            rows.reshape(-1, rows.shape[-1]),
            describe_kinds(kinds),
            {"kinds": [dict(part.provenance) for part in parts]},
            kinds,
        )

    def split_kinds(self) -> list[Windows]:
        """Return the windows of each kind."""
        if len(self.kinds) == 1:
            return [self]
        provenances = self.provenance.get("kinds") or [{}] * len(self.kinds)
        return [
            Windows(self.input_ids[index :: len(self.kinds)], kind.spec, provenance)
            for index, (kind, provenance) in enumerate(zip(self.kinds, provenances, strict=True))
        ]

    def list_weights(self) -> list[float]:
        """Return for each window the weight of its kind."""
        return [self.kinds[index % len(self.kinds)].weight for index in range(self.num_windows)]

    @property
    def num_windows(self) -> int:
        """Number of windows."""
        return int(self.input_ids.shape[0])

    @property
    def seq_len(self) -> int:
        """Tokens in a window; all but the first are predicted."""
        return int(self.input_ids.shape[1])

    @property
    def sha256(self) -> str:
        """Hash of shape and tokens."""
        header = f"{self.num_windows}x{self.seq_len}:".encode()
        return hashlib.sha256(header + self.input_ids.astype("<i4").tobytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the windows as the bytes of an ``.npz`` file without pickles."""
        document: dict[str, Any] = {"spec": self.spec, "provenance": dict(self.provenance)}
        if len(self.kinds) > 1:
            document["kinds"] = dump_kinds(self.kinds)
        about = json.dumps(document)
        stream = io.BytesIO()
        np.savez_compressed(stream, input_ids=self.input_ids, about=np.array(about))
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Windows:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            StudyError: for anything else.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                about = json.loads(str(archive["about"]))
                kinds = parse_dumped_kinds(about.get("kinds", ()))
                return cls(archive["input_ids"], about["spec"], about["provenance"], kinds)
        except Exception as error:  # a damaged archive fails in many ways inside zipfile and numpy
            raise StudyError(
                f"stored windows cannot be read ({error}); begin a new study with `lpsearch optimize --fresh`"
            ) from None
