"""The measured decoder: wide layers, a static cache, kernels and captured graphs."""
