"""Text, contexts, language models and their activations."""
