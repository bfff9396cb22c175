"""Tensors every SAE and loss works on: sums, sparse codes, positions."""
