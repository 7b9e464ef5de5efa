"""One thread for the linear algebra of a proposal.

Its matrices have some hundred rows. Several threads take longer for them than one, more so beside evaluations on the
same cores, and round their sums otherwise, by which the plans of a search would depend on the machine's cores.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

from threadpoolctl import ThreadpoolController

__all__ = ["one_blas_thread"]


def one_blas_thread() -> AbstractContextManager[object]:
    """Let numpy and scipy multiply and factorise matrices in one thread; torch's own threads stay as they are."""
    limited: AbstractContextManager[object] = _find_libraries().limit(limits=1, user_api="blas")
    return limited


@cache
def _find_libraries() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401, only libraries that are loaded are found

    return ThreadpoolController()
