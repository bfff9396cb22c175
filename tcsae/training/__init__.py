"""A bank of SAEs on one stream of activations, checkpointed and resumable."""
