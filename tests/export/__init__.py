"""Tests of exported directories."""
