"""Tests of lpsearch.transform."""
