"""Other people's files: Hugging Face checkpoints, tokenizers, peft adapters."""
