"""Fixed windows of tokens, on which every plan is evaluated."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsearch.errors import StudyError

__all__ = ["Windows"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows and what they are.

    Attributes:
        input_ids: int32, ``(windows, seq_len)``, read-only.
        spec: what the tokens are, in full, e.g. ``wikitext2:validation``.
        provenance: what tells these windows from others of the same specification, in JSON's types: the half-open
            range of tokens within the text, or seed, dtype and fingerprint of the model that they were sampled from.
    """

    input_ids: npt.NDArray[np.int32]
    spec: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the shape and freeze the tokens.

        Raises:
            ValueError: unless there is at least one window of at least two tokens.
        """
        if self.input_ids.ndim != 2 or self.input_ids.shape[0] < 1 or self.input_ids.shape[1] < 2:
            raise ValueError(f"windows must have shape (windows >= 1, seq_len >= 2), got {self.input_ids.shape}")
        input_ids = np.ascontiguousarray(self.input_ids, dtype=np.int32)
        if input_ids is self.input_ids:
            input_ids = input_ids.copy()
        input_ids.setflags(write=False)
        object.__setattr__(self, "input_ids", input_ids)

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
        about = json.dumps({"spec": self.spec, "provenance": dict(self.provenance)})
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
                return cls(archive["input_ids"], about["spec"], about["provenance"])
        except Exception as error:  # a damaged archive fails in many ways inside zipfile and numpy
            raise StudyError(
                f"stored windows cannot be read ({error}); begin the study anew with `lpsearch optimize --fresh`"
            ) from None
