"""training.precision = tf32: short mantissas for a step's products on a GPU, and nothing else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers import small_config

from tcsae.data.batches import Batch, Calibration
from tcsae.jobs.job import _bfloat16_products
from tcsae.training.member import Member


def test_tf32_is_on_in_a_step_and_off_after_it_and_on_a_cpu_it_is_float32(
    tiny_gpt2: Path, texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(4, 16, dtype=torch.bool)
    batch = Batch(x, ones.long(), ones.long(), ones, ones)
    matmul, ends, seen = torch.backends.cuda.matmul, [], []
    for precision in ("tf32", "float32"):
        config = small_config(
            tiny_gpt2, texts, sae="topk", sae__d_sae="64", sae__k="2", window="4", layer="1",
            training__precision=precision, training__tokens="640",
        )  # fmt: skip
        with caplog.at_level(logging.WARNING):
            assert not _bfloat16_products(config, "cpu")
        member = Member(config, 12, Calibration(3.0, torch.inf, 0.0, x.flatten(0, 1)), "cpu", False)
        forward = member.forward
        member.forward = lambda *a, forward=forward, **k: (
            seen.append(matmul.allow_tf32) or forward(*a, **k)
        )
        for _ in range(2):
            member.train_step(batch, x * member.scale, log=False)
        assert not matmul.allow_tf32
        assert "float32 on cpu" in member.made_by
        ends.append(member.sae.W_dec.detach().clone())
    assert seen == [True, True, False, False]
    assert torch.equal(*ends)
    assert [r.message for r in caplog.records] == [
        "training.precision = tf32 is for GPUs: on cpu it is float32"
    ]
