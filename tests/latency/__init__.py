"""Tests of lpsearch.latency."""
