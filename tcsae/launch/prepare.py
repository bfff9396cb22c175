"""`--prepare` and `--harvest`: what jobs need of the network and of the language model, beforehand.

On a cluster whose nodes have no network, on its login node; or on a node that has a GPU while those
that train wait for none. Nothing is trained, and no run's folder is made.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tcsae.base.errors import INTERRUPTED_EXIT_CODE, Interrupted, UserError
from tcsae.config import Config
from tcsae.launch.jobs import stream_key

log = logging.getLogger(__name__)

What = Literal["text", "activations"]


def prepare(configs: Sequence[Config], what: What) -> None:
    """Fetch weights and tokenizer, pack the contexts and, for "activations", fill the stores.

    What is there already is left as it is, so that the same command again goes on.

    Raises:
        UserError: weights or text that cannot be had, a disk that is full, a store that streams.
    """
    # Here, as a sweep's plan needs no torch.
    from tcsae.base.signals import stop_on_signal
    from tcsae.data.stream import open_contexts, open_stream

    streams = list({stream_key(config): config for config in configs}.values())
    if what == "activations" and all(config.store.mode == "stream" for config in streams):
        raise UserError("--harvest: store=stream keeps no activations; --prepare packs the text")
    tokens = 0
    try:
        with stop_on_signal() as stop:
            for config in streams:
                # The SAE's device need not be where the activations are harvested.
                training = config.training.model_copy(update={"device": None})
                no_sae = config.model_copy(update={"training": training})
                if what == "activations" and config.store.mode == "disk":
                    contexts = [s.source.contexts for s in open_stream(no_sae, stop).sides]
                else:
                    contexts = list(open_contexts(config, stop)[1])
                tokens += sum(part.ids.numel() for part in contexts)
    except Interrupted as stopped:
        log.warning(f"{stopped}; the same command goes on from here")
        sys.exit(INTERRUPTED_EXIT_CODE)
    kinds = {"text": "weights and text", "activations": "weights, text and activations"}
    streams_said = "1 stream" if len(streams) == 1 else f"{len(streams)} streams"
    places = sorted({str(Path(config.store.dir).expanduser()) for config in streams})
    log.info(
        f"prepared: {kinds[what]} of {streams_said}, {tokens:,} tokens, in {', '.join(places)}; "
        "the same command without the flag goes on from there"
    )
