"""Tests of what serves a study live."""
