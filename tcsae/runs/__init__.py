"""A run on disk: its folder, its state, what is seen of it from outside."""
