"""A context in which transformers reports nothing but errors, and what it would have reported is kept."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

__all__ = ["quiet_transformers"]


class _Collector(logging.Handler):
    """Keeps the text of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def quiet_transformers() -> Iterator[list[str]]:
    """Silence the progress bars and log chatter of transformers; what it was set to is restored afterwards.

    The bar of its GGUF reader obeys no setting, so standard error is held back as well: loading raises what matters.

    Yields:
        The warnings that transformers gave meanwhile: some of its errors only say to look there.
    """
    library = logging.getLogger("transformers")
    verbosity, propagate = transformers_logging.get_verbosity(), library.propagate
    progress_bars = transformers_logging.is_progress_bar_enabled()
    levels = [(handler, handler.level) for handler in library.handlers]
    collector = _Collector()
    for handler in library.handlers:
        handler.setLevel(logging.ERROR)
    library.addHandler(collector)
    library.propagate = False
    transformers_logging.set_verbosity(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield collector.messages
    finally:
        transformers_logging.set_verbosity(verbosity)
        library.propagate = propagate
        library.removeHandler(collector)
        for handler, level in levels:
            handler.setLevel(level)
        if progress_bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
