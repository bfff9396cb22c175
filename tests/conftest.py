"""What tests share: small real models, the embedded one, and text."""

from __future__ import annotations

import os

# Nothing in the tests may reach for a hub; what needs one must say so by failing.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
