"""What tests of the whole job share: tiny models, a little text, and ways to run the command."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
SLOW = (
    *(
        "test_embedded.py",
        "launch/test_slurm.py",
        "launch/test_slurm_ranks.py",
        "launch/test_launchers.py",
        "test_bench.py",
    ),
    *("launch/test_ranks.py", "launch/test_adaptive.py"),
    *("launch/test_estimate.py", "training/test_resume.py", "training/test_edges.py"),
    *("test_run.py", "test_kill.py", "test_tracking.py", "test_bad_input.py", "test_install.py"),
    *("report/test_run_page.py", "report/test_compare_page.py", "test_compare.py"),
    *("test_look.py", "test_serve.py", "meaning/test_meaning_run.py", "meaning/test_again.py"),
    *("training/test_architectures.py", "training/test_no_synchronisation.py"),
    *("training/test_fake_cuda.py", "training/test_metrics.py"),
    *("sae/test_dead_features.py", "data/test_language_model.py", "data/test_store.py"),
    *("test_evaluate.py", "test_export.py", "test_calibrate.py", "metrics/test_specialization.py"),
    *("test_analysis.py", "products/test_kernels.py", "test_synthetic_run.py"),
)
"""Files that take more than ten seconds of the suite: not in `make check`, in `make test`.

They run first, the longest at the head, so that no worker is left alone with a long one at the end.
"""
_LOG_LINE = re.compile(r"^(\d\d:\d\d:\d\d|\[\d{4}-\d\d-\d\d) ")


# ------------------------------------------------------------------------------ tiny models


TEXT = """
the a of and in river stone morning walked quietly under old light she he they saw found
bridge letter winter garden answer question small dark bright never always because while
machine feature window number seven eleven crossing harbour table bread voice silence
"""
WORDS = TEXT.split()


def tiny_tokenizer() -> Any:
    """A byte-level BPE of 400 tokens: it loads in a millisecond and its models have small ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _config(kind: str, vocab_size: int) -> Any:
    from transformers import Gemma2Config, GPT2Config, LlamaConfig

    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size, n_positions=128, n_embd=48, n_layer=3, n_head=4, **special
        )
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **special,
    }
    if kind == "llama":
        return LlamaConfig(**shared)
    return Gemma2Config(
        **shared,
        head_dim=8,
        query_pre_attn_scalar=8,
        # Small enough for contexts of 16 to notice both.
        sliding_window=8,
        attn_logit_softcapping=2.0,
    )


def write_tiny_model(kind: str, folder: Path) -> Path:
    """A random 3-layer model ("gpt2", "gemma2" or "llama"), as save_pretrained writes it."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.utils.logging.disable_progress_bar()
    tokenizer = tiny_tokenizer()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(kind, len(tokenizer)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights of 0.02 make every block an identity; biases and gains of 0 and 1 hide bugs.
            if "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.set_rng_state(state)
    return folder


def write_texts(folder: Path, documents: int = 12, words: int = 150, seed: int = 0) -> Path:
    """`documents` text files of random words."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = " ".join(generator.choice(WORDS) for _ in range(words))
        (folder / f"{number:02d}.txt").write_text(f"Document {number}. {text}.\n")
    return folder


SMALL = {
    "dataset.context_size": "16",
    "dataset.n_contexts": "48",
    "dataset.n_eval_contexts": "8",
    "dataset.eval_fraction": "0.3",
    "evaluation.max_lag": "8",
    "evaluation.windows": "[2,4]",
    "evaluation.model_contexts": "4",
    "evaluation.bootstrap": "100",
    "evaluation.analysis": "false",
    "model.forward_contexts": "4",
    "model.dtype": "float32",
    "store.shard_contexts": "8",
    "training.batch_contexts": "8",
    "training.tokens": "1536",
    "training.checkpoint_every": "4",
    "training.log_every": "2",
    "training.precision": "float32",
    "sae.d_sae": "96",
    "window": "4",
    "lambda": "0.1",
    "tracking": "disabled",
}
"""Overrides for a job of 12 steps on 48 contexts of 16 tokens in 6 shards."""


def small_job(weights: Path, texts: Path, folder: Path | str, **changes: str) -> list[str]:
    """Arguments of a small job; keys of `changes` are written with __ for the dot."""
    chosen = {
        "model": "other",
        "model.name": "test/tiny",
        "model.path": str(weights),
        "dataset": "files",
        "dataset.path": str(texts),
        "hydra.run.dir": str(folder),
        "sae": "topk",
        **SMALL,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    if chosen["sae"] == "topk" and "training.target_l0" not in chosen:
        chosen.setdefault("sae.k", "8")
    if chosen.get("store") == "stream":
        del chosen["store.shard_contexts"]  # it stores none
    return [f"{key}={value}" for key, value in chosen.items()]


def small_config(weights: Path, texts: Path, **changes: str) -> Any:
    """The checked Config of `small_job`."""
    job = small_job(weights, texts, "unused", **changes)
    from tcsae.config.compose import config_of

    return config_of(*(a for a in job if "hydra." not in a))


# ------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Outcome:
    """What a call of `python -m tcsae.train` came to."""

    code: int
    stderr: str
    stdout: str = ""

    @property
    def messages(self) -> list[str]:
        """Lines on stderr that are not lines of the log."""
        return [line for line in self.stderr.splitlines() if line and not _LOG_LINE.match(line)]

    def refusal(self) -> str:
        """The one line that a refused call leaves beside its log."""
        assert self.code not in (0, 75), self.stderr
        assert len(self.messages) == 1, self.stderr
        line = self.messages[0]
        assert line.startswith("tcsae: "), line
        assert "Traceback" not in line
        return line


@contextlib.contextmanager
def _kept_logging() -> Iterator[None]:
    """Hydra configures the root logger; afterwards it is as it was."""
    root = logging.getLogger()
    handlers, level, raises = list(root.handlers), root.level, logging.raiseExceptions
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                with contextlib.suppress(OSError):  # what was not written on a full disk
                    handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.raiseExceptions = raises


def run_here(*arguments: str) -> Outcome:
    """The command in this process: what main() does, without the seconds of its imports."""
    from hydra.core.global_hydra import GlobalHydra

    from tcsae import train

    GlobalHydra.instance().clear()
    before, sys.argv = sys.argv, ["tcsae.train", *arguments]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    err, out, code = io.StringIO(), io.StringIO(), 0
    try:
        with _kept_logging(), contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            try:
                train.main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    assert handlers == {s: signal.getsignal(s) for s in handlers}, "signal handlers were left"
    return Outcome(code, err.getvalue(), out.getvalue())


def environment(**more: str) -> dict[str, str]:
    """For a subprocess: one thread, no hub, this checkout."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
        **more,
    }


def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
    """The command in a process of its own; started from nothing if its PYTHONPATH is another."""
    if "PYTHONPATH" not in env and sys.platform == "linux":
        from forked import Forked

        return Forked(list(arguments), environment(**env))
    return subprocess.Popen(
        [sys.executable, "-m", "tcsae.train", *arguments],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=240)
    return Outcome(process.returncode, err, out)


def run_apart(*arguments: str, **env: str) -> Outcome:
    """The command in a process of its own, to its end."""
    return finish(start(*arguments, **env))


# ------------------------------------------------------------------------------ what it left


def digest(path: Path) -> str:
    from tcsae.base.files import file_digest

    return file_digest(path)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the saved SAE's weights."""
    return digest(folder / "sae" / "sae_weights.safetensors")


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def leftovers(folder: Path) -> list[Path]:
    """Temporary files and folders under `folder`."""
    return [path for path in folder.rglob(".*") if "tmp" in path.name]


# -------------------------------------------------------------------------------- two at once


def harvest_together(
    weights: str, texts: str, roots: list[str], barrier: Any, answers: Any, layer: str, also: str
) -> None:
    """Opens the stream of one job in every root, at the same moment as another process.

    Puts (root, numbers of packings and of forward passes, digest of all that it reads) on
    `answers`.
    """
    import pytest
    import torch

    from tcsae.base.files import tensors_digest
    from tcsae.base.signals import StopRequest
    from tcsae.data import context_cache
    from tcsae.data.language_model import LanguageModel
    from tcsae.data.stream import open_stream

    with pytest.MonkeyPatch.context() as patch:
        passes = count_calls(LanguageModel, "activations_at", patch)
        packings = count_calls(context_cache, "_build_contexts", patch)
        for root in roots:
            place = {"layer": layer, "store__also": also}
            config = small_config(Path(weights), Path(texts), store__dir=root, **place)
            passes.clear()
            packings.clear()
            barrier.wait(timeout=120)
            stream = open_stream(config, StopRequest())
            parts = (stream.train, stream.evaluation)
            read = {str(i): part.batch(torch.arange(len(part))).x for i, part in enumerate(parts)}
            answers.put((root, len(packings), len(passes), tensors_digest(read)))


def count_calls(owner: Any, name: str, monkeypatch: Any) -> list[tuple[Any, ...]]:
    """The arguments of every call of a function or method from now on; it works as before."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls
