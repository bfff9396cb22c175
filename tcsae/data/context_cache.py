"""Contexts packed once and shared by all jobs on the same text and tokenizer.

<store.dir>/contexts/<key>/train.safetensors, eval.safetensors      ids, segments, masks, documents,
                                                                   a passage of one document
                              seen.json      the share of held-out contexts that is trained on
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

from tcsae.base.files import (
    Lock,
    load_tensors,
    locked,
    make_folder,
    read_json,
    remove_temporaries,
    save_tensors,
    write_json,
)
from tcsae.base.progress import Progress
from tcsae.base.signals import StopRequest
from tcsae.config import DatasetConfig
from tcsae.data.contexts import Contexts, SpecialIds, build_contexts
from tcsae.data.corpora import open_corpus
from tcsae.data.documents import Corpus
from tcsae.data.language_model import LanguageModel
from tcsae.data.seen import share_seen
from tcsae.data.store import content_key

log = logging.getLogger(__name__)

FORMAT = 4
"""Part of the identity of packed contexts, beside that of activations (tcsae/data/store.py)."""

MIN_DOCUMENTS = 16
"""Held-out documents below which no interval is given: MIN_UNITS of tcsae/metrics/units.py."""


def _save_contexts(path: Path, contexts: Contexts) -> None:
    names = ("ids", "segments", "valid", "documents", "passage")
    tensors = {name: getattr(contexts, name) for name in names}
    save_tensors(path, tensors, {"groups": json.dumps(list(contexts.groups))})


def _load_contexts(path: Path) -> Contexts:
    tensors, metadata = load_tensors(path, "delete it; the next run makes it anew")
    return Contexts(**tensors, groups=tuple(json.loads(metadata["groups"])))


_PACKING = {
    *("n_contexts", "n_eval_contexts", "eval_fraction", "context_size", "seed", "eval_key"),
    *("chat", "segments"),
}


def load_or_build_contexts(
    cfg: DatasetConfig, model: LanguageModel, root: Path, stop: StopRequest
) -> tuple[Contexts, Contexts]:
    """Training and held-out contexts, from `root`/contexts if this text was packed before.

    Raises:
        UserError: text that cannot be read or is too little, contexts too long for the model, a
            token that it does not know.
        Interrupted: a signal came.
    """
    model.check_length(cfg.context_size)
    corpus = open_corpus(cfg)
    special: SpecialIds = model.special_ids
    identity = {
        "format": FORMAT,
        "text": corpus.fingerprint(),
        "tokenizer": model.weights.identity,
        "special": [special.bos, sorted(special.boundaries), sorted(special.masked)],
        **cfg.model_dump(include=_PACKING),
    }
    folder = root / "contexts" / content_key(identity)
    paths = folder / "train.safetensors", folder / "eval.safetensors"
    if not all(path.is_file() for path in paths):
        with locked(make_folder(folder) / ".lock", stop.check) as lock:
            # Another process may have packed them while this one waited, and be writing seen.json.
            if not all(path.is_file() for path in paths):
                if lock is Lock.HELD:
                    remove_temporaries(folder)
                both = _build_contexts(corpus, cfg, model, stop)
                for path, contexts in zip(paths, both, strict=True):
                    _save_contexts(path, contexts)
                write_json(folder / "identity.json", identity)
                # Under the lock: whoever takes it next removes what is half written.
                _seen(folder / "seen.json", both)
    both = _load_contexts(paths[0]), _load_contexts(paths[1])
    for contexts in both:
        # Of contexts from the cache too: the same tokenizer may lie beside a smaller model.
        model.check_ids(int(contexts.ids.max()))
    _say_how_many_documents(both[1])
    return both[0], replace(both[1], seen=_seen(folder / "seen.json", both))


def _seen(path: Path, both: tuple[Contexts, Contexts]) -> float:
    if not path.is_file():
        write_json(path, {"share": share_seen(*both)})
    return float(read_json(path)["share"])


def _say_how_many_documents(held_out: Contexts) -> None:
    n = held_out.n_documents
    documents = "1 document" if n == 1 else f"{n} documents"
    said = f"{len(held_out)} held-out contexts from {documents}"
    if n >= MIN_DOCUMENTS:
        log.info(said)
        return
    none = "" if n > 1 else "no consistency, which takes 2, and "
    log.warning(
        f"{said}: {none}no intervals will be given, which take at least {MIN_DOCUMENTS}; raise "
        "dataset.eval_fraction, or give more documents: more files, or jsonl with a row for each"
    )


def _build_contexts(
    corpus: Corpus, cfg: DatasetConfig, model: LanguageModel, stop: StopRequest
) -> tuple[Contexts, Contexts]:
    log.info(f"packing contexts of {cfg.context_size} tokens from {corpus.describe()}")
    total = (cfg.n_contexts or 0) + cfg.n_eval_contexts
    with Progress("pack", total, unit="contexts") as progress:

        def report(so_far: int, _: int | None) -> None:
            stop.check()
            progress.update(so_far - progress.done)

        return build_contexts(corpus, model.tokenizer, model.special_ids, cfg, progress=report)
