"""Exported directories served by a real vLLM; `make test-vllm` makes everything that these tests need."""
