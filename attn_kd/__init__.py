"""Attention distillation for detection transformers: softmax attention and its divergence in one sweep."""

__version__ = "0.1.0"
