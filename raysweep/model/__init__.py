"""Hugging Face models and their data: text, tokens, blocks, one shard, capture, evaluation. No Ray."""
