"""Tests of lpsearch.export."""
