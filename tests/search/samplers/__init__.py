"""Tests of lpsearch.search.samplers."""
