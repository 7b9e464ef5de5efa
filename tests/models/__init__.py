"""Tests of lpsearch.models."""
