"""Tests that run exported GGUF files in stock llama.cpp; they skip where its binding `xllamacpp` is not installed."""
