"""Tests of lpsearch.evaluation."""
