"""training.average: the mean activations of windows or documents are trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import run_here, small_config, small_job
from torch import Tensor

import tcsae
from tcsae.base.errors import UserError
from tcsae.base.run_files import RunFiles
from tcsae.config import run_id, run_name
from tcsae.config.compose import config_of
from tcsae.data.batches import Batch, Calibration
from tcsae.live.sides import role
from tcsae.report.index_page import write_index
from tcsae.tensors.positions import block_means
from tcsae.training.member import Member

D_IN = 6
AVERAGED = {"consistency": "none", "window": "4"}


def a_batch(x_BTD: Tensor) -> Batch:
    """Two documents in each context; some tokens are not valid."""
    n_contexts, n_positions, _ = x_BTD.shape
    segments = torch.zeros(n_contexts, n_positions, dtype=torch.int32)
    segments[:, 10:] = 1
    valid = torch.ones(n_contexts, n_positions, dtype=torch.bool)
    valid[:, 0] = valid[0, 5] = valid[:, 10] = False
    return Batch(x_BTD, torch.zeros_like(segments), segments, valid, valid)


def member(tiny_gpt2: Path, texts: Path, **changes: str) -> Member:
    config = small_config(tiny_gpt2, texts, **{**AVERAGED, **changes})
    sample = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(2))
    return Member(config, D_IN, Calibration(1.0, 9.0, 0.0, sample), "cpu", autocast=False)


def test_a_mean_is_of_the_valid_tokens_of_one_document_in_one_window() -> None:
    x = torch.tensor([1.0, 2, 4, 100, 8, 16, 32, 64])[None, :, None]
    segments = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]])
    valid = torch.tensor([[False, True, True, False, True, True, True, True]])
    means = block_means(x, 4, segments, valid)[0, :, 0].tolist()
    assert means == [1, 3, 3, 100, 12, 12, 48, 48]
    assert block_means(x, 8, segments, valid)[0, :, 0].tolist() == [
        1,
        7.5,
        7.5,
        100,
        7.5,
        7.5,
        48,
        48,
    ]
    # The last window is shorter where the length does not divide the context.
    assert block_means(x, 5, segments, valid)[0, 4:6, 0].tolist() == pytest.approx([14 / 3, 16])


def test_what_is_left_out_is_in_no_mean() -> None:
    x = torch.randn(2, 20, D_IN)
    batch = a_batch(x)
    spoiled = torch.where(batch.valid[..., None], x, torch.nan)
    means = [block_means(v, 4, batch.segments, batch.valid)[batch.valid] for v in (x, spoiled)]
    assert torch.equal(means[0], means[1]) and means[0].isfinite().all()


@pytest.mark.parametrize("sae", ["topk", "batchtopk", "standard"])
def test_of_activations_that_do_not_change_in_a_window_the_step_is_the_usual_one(
    sae: str, tiny_gpt2: Path, texts: Path
) -> None:
    by_block = torch.randn(2, 20, D_IN, generator=torch.Generator().manual_seed(1))
    batch = a_batch(by_block)
    constant = block_means(by_block, 4, batch.segments, batch.valid)
    loose = torch.randn(2, 20, D_IN, generator=torch.Generator().manual_seed(3))

    def weights(average: str, x_BTD: Tensor) -> list[Tensor]:
        own = member(tiny_gpt2, texts, sae=sae, training__average=average)
        own.train_step(replace(batch, x=x_BTD), x_BTD, log=False)
        return [parameter.detach() for parameter in own.sae.parameters()]

    usual = weights("none", constant)
    for ours, theirs in zip(weights("window", constant), usual, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # And of others it is that of their means, which is another.
    means = block_means(loose, 4, batch.segments, batch.valid)
    ours, theirs, single = (
        weights(how, x) for how, x in (("window", loose), ("none", means), ("none", loose))
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not all(torch.allclose(a, b) for a, b in zip(ours, single, strict=True))


def test_of_documents_the_mean_is_the_whole_document(tiny_gpt2: Path, texts: Path) -> None:
    batch = a_batch(torch.randn(2, 20, D_IN))
    for changes in ({"training__average": "document"}, {"window": "document"}):
        chosen = {"training__average": "window", **changes}
        seen = member(tiny_gpt2, texts, **chosen)._averaged(batch, batch.x)
        of_second = batch.valid[1] & (batch.segments[1] == 1)
        mean = batch.x[1][of_second].mean(0)
        torch.testing.assert_close(seen[1][of_second], mean.expand(int(of_second.sum()), -1))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("training.average=window", "consistency=none"),
        ("training.average=document sae=tsae consistency=none", "take another"),
        ("training.average=window sae=persistent consistency=none", "take another"),
        ("training.average=turn consistency=none", "training.average"),
    ],
)
def test_what_goes_by_the_order_of_tokens_is_refused(overrides: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        config_of(*overrides.split())
    assert said in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_page_notes_and_card_say_what_it_was_trained_on(
    tiny_gpt2: Path, texts: Path, tmp_path: Path
) -> None:
    changes = {**AVERAGED, "training__average": "window", "store__dir": str(tmp_path / "store")}
    done = run_here(*small_job(tiny_gpt2, texts, tmp_path / "run", **changes))
    assert done.code == 0, done.stderr
    files = RunFiles(tmp_path / "run")
    run = tcsae.load_run(tmp_path / "run")
    assert run_name(run.config) == f"gpt2-lmid-topk-averaged-w4-lambda0.1-s0-{run_id(run.config)}"
    assert "averaged, window 4" in repr(run) and "none" not in repr(run)
    assert role(run) == "averaged"
    with files.report.open(encoding="utf-8") as page:
        assert "consistency averaged, window 4" in " ".join(page.read().split())
    index = write_index(tmp_path).read_text(encoding="utf-8")
    assert ">averaged<" in index and ">none<" not in index
    for file in (files.notes, files.report):
        words = " ".join(file.read_text().split())
        assert "trained on the mean of every 4 positions" in words
        assert "measured on single tokens" in words
