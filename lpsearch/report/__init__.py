"""The report of a study: what it found, as figures and one HTML file. Imports no torch."""

from __future__ import annotations

from lpsearch.report.html import build_html, write_html
from lpsearch.report.study import StudyReport, load_report

__all__ = ["StudyReport", "build_html", "load_report", "write_html"]
