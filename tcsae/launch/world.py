"""What a job on a synthetic world costs where others run a language model. Loads no torch."""

from __future__ import annotations

from tcsae.config import Config
from tcsae.config.synthetic import WorldConfig
from tcsae.launch.machine import Work
from tcsae.launch.model_facts import ModelFacts

DRAW_SECONDS = 3e-8
"""A token, a true feature or dimension: on one core 1.8e-8 measured with 480 of them, 3.5e-8 with
1,280."""
TRUTH_SECONDS = 1.2e-7
"""A held-out token and true feature, drawn again and followed beside its match. Measured."""


def facts_of(world: WorldConfig) -> ModelFacts:
    """Its shape: one layer, and what stands for tokens (data/synthetic_model.py)."""
    return ModelFacts("", 1, world.d_in, world.n_true + 2)


def draw(world: WorldConfig, tokens: int) -> Work:
    """Documents of so many tokens, on the host."""
    seconds = DRAW_SECONDS * tokens * (world.n_true + world.d_in)
    return Work("draw the documents", host_seconds=seconds)


def truth(config: Config, held_out: int) -> Work:
    """The SAE against what there is, on so many contexts."""
    world = config.model.world
    assert world is not None
    tokens = held_out * config.dataset.context_size
    return Work("truth", host_seconds=TRUTH_SECONDS * tokens * world.n_true)
