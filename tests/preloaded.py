"""Importing what commands import, for the server whose forks begin with it (:mod:`tests.warm`)."""

from __future__ import annotations

import contextlib
import gc
import importlib
import pkgutil

import lpsearch

_BY_THE_WAY = (
    "alembic.context",
    "lpsearch_dashboard.app",
    "optuna_dashboard",
    "sklearn.ensemble",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)
"""What libraries import when they are first used, and parts of this project that nobody imports."""

_names = [found.name for found in pkgutil.walk_packages(lpsearch.__path__, "lpsearch.")]
for _name in (*(name for name in _names if not name.endswith(("__main__", "lpsearch.optimize"))), *_BY_THE_WAY):
    with contextlib.suppress(Exception):  # of optional parts, some are not installed
        importlib.import_module(_name)
gc.freeze()  # forks leave these objects where they are
