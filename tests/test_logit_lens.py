"""The logit lens against the model itself: at its last block nothing is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import write_tiny_model

from tcsae.config import ModelConfig
from tcsae.data.language_model import LanguageModel
from tcsae.measure.logit_lens import logit_lens

K = 5


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "llama"])
def test_a_direction_raises_and_lowers_what_the_model_says_it_does(
    kind: str, tmp_path: Path
) -> None:
    """A LayerNorm with biases, an RMSNorm that keeps its weight less 1, and a plain one."""
    folder = write_tiny_model(kind, tmp_path / kind)
    model = LanguageModel(ModelConfig(name="t/m", path=str(folder), dtype="float32"), "last")
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(7, model.d_in, generator=generator)
    W_dec -= W_dec.mean(1, keepdim=True)  # a LayerNorm takes the mean away
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    chosen = torch.tensor([1, 4, 6])
    found = logit_lens(W_dec, chosen, model, K)
    assert torch.equal(found["features"], chosen)
    ids = torch.tensor([[model.special_ids.bos, 5, 6]])
    nothing = model.logits(ids, torch.zeros_like)[0, -1]
    for row, feature in enumerate(chosen.tolist()):
        alone = W_dec[feature]
        change = model.logits(ids, lambda x, a=alone: a.expand_as(x))[0, -1] - nothing  # type: ignore[misc]
        assert found["raised"][row].tolist() == change.topk(K).indices.tolist()
        assert found["lowered"][row].tolist() == (-change).topk(K).indices.tolist()
        if kind != "gemma2":  # whose logits are capped, in the same order
            scale = model.d_in**0.5  # a norm makes a vector of norm 1 so long
            by = (change - change.mean())[found["raised"][row].long()] / scale
            torch.testing.assert_close(found["raised_by"][row], by, atol=1e-4, rtol=1e-4)


def test_an_sae_of_another_width_has_none(tiny_gpt2: Path) -> None:
    model = LanguageModel(ModelConfig(name="t/m", path=str(tiny_gpt2), dtype="float32"), 1)
    assert logit_lens(torch.eye(3), torch.arange(3), model) == {}
