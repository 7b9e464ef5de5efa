"""Tests of the scripts under studies."""
