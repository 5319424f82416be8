"""Relabelled shards → a fine-tuned diffusers pipeline."""
