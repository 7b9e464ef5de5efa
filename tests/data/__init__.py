"""Tests of lpsearch.data."""
