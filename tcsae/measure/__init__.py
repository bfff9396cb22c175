"""A trained SAE on held-out text: what it does, and what its features are."""
