"""Sweeps: from a grid of overrides to jobs, packs of jobs, and what runs them."""
