"""Tensor parallelism: ranks in processes of their own, how they add up, and measuring a model that they share."""
