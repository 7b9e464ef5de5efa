"""Winning back what a plan loses: closed-form refits and distilling."""
