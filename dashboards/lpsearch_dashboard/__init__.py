"""Serves a study while it is searched: lpsearch's live page and optuna-dashboard under one address of this machine."""

from __future__ import annotations

from lpsearch_dashboard.server import DashboardServer, build_server

__all__ = ["DashboardServer", "build_server"]
