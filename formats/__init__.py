"""Reads and writes other people's files: Hugging Face checkpoints, tokenizers, PEFT adapters."""
