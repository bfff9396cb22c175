"""Windows, their Laplacian and the penalty made of them; tcsae/consistency.py is the loss."""
