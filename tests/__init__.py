"""Tests of lpsearch, laid out as the package is."""
