"""Tests of lpsearch.search."""
