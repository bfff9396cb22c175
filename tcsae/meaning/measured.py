"""The instruments by name, and `eval/meaning.json`: what the chosen ones found of a run's SAE."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tcsae.base.files import make_folder, read_json, write_json
from tcsae.base.json_numbers import plain
from tcsae.base.run_files import EvalFiles
from tcsae.base.stages import stage
from tcsae.config import Measured
from tcsae.meaning.held_text import Findings, HeldText
from tcsae.meaning.lengths import lengths
from tcsae.meaning.probes import probes
from tcsae.meaning.shift import shift
from tcsae.sae.base import SparseAutoencoder

log = logging.getLogger(__name__)

DIGITS = 6
Instrument = Callable[[SparseAutoencoder, HeldText, Measured], Findings]
"""The SAE, on raw activations and the batches' device; the held-out text; the run's config, of
which the window and the keys of the instrument matter. Raises Interrupted if a signal comes,
UserError for what makes the whole instrument impossible; what is missing for a part of it is a
sentence."""
INSTRUMENTS: dict[str, Instrument] = {"probes": probes, "shift": shift, "lengths": lengths}


def measure_meaning(
    sae: SparseAutoencoder, text: HeldText, config: Measured
) -> dict[str, dict[str, Any]]:
    """What the instruments of `evaluation.meaning` find: {instrument: content of meaning.json}."""
    sae = sae.to(text.batches.device).eval()
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(config.evaluation.meaning):
        with stage(name), torch.inference_mode():
            findings = INSTRUMENTS[name](sae, text, config)
        for sentence in findings.said:
            log.info(f"{name}: {sentence}")
        found[name] = plain(findings.dump(), DIGITS)
    return found


def write_meaning(folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """Write it into a run's eval/, beside what other instruments found before; returns all."""
    file = EvalFiles(make_folder(folder)).meaning
    before = read_json(file) if file.is_file() else {}
    together = {**before, **found}
    write_json(file, together)
    return together


def headlines(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The part of meaning.json that final_info.json repeats: {name: {value, interval}}."""
    return {
        name: {"value": number["value"], "interval": number["interval"]}
        for part in found.values()
        for name, number in part["headline"].items()
    }
