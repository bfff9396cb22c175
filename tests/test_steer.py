"""Steering against transformers alone: its own generation, and a hook of its own on the block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_here, small_job

import tcsae
from tcsae.base.errors import UserError
from tcsae.measure.steering import _with_features, continuation
from tcsae.runs.folder import LoadedRun
from tcsae.steer import main

PROMPT = "the river walked"
LAYER = 1


@pytest.fixture(scope="module")
def folder(tiny_gpt2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("steer")
    done = run_here(
        *small_job(tiny_gpt2, texts, root / "run", layer=str(LAYER), store__dir=str(root / "store"))
    )
    assert done.code == 0, done.stderr
    return root / "run"


@pytest.fixture(scope="module")
def run(folder: Path) -> LoadedRun:
    return tcsae.load_run(folder)


@pytest.fixture(scope="module")
def feature(run: LoadedRun) -> int:
    """One that is on in the prompt."""
    return run.features(PROMPT).top(1)[0].feature


def by_transformers(run: LoadedRun, folder: Path, hook: Any = None, n: int = 8) -> str:
    """The likeliest continuation, by transformers' own classes alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    if hook is not None:
        model.transformer.h[LAYER].register_forward_hook(hook)
    start = len(ids)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:]))


def test_without_steering_it_is_what_transformers_generates(
    run: LoadedRun, tiny_gpt2: Path, feature: int
) -> None:
    found = run.steer(PROMPT, feature, 3.0, tokens=8)
    assert found.plain == by_transformers(run, tiny_gpt2) != ""


@pytest.mark.parametrize("strength", [0.0, 40.0])
def test_steered_it_is_what_a_hook_of_ones_own_gives(
    run: LoadedRun, tiny_gpt2: Path, feature: int, strength: float
) -> None:
    value = strength * float(run.per_feature["mean_activation"][feature])

    def hook(_: Any, __: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        own = run.sae.encode(x)[..., feature, None]
        new = x + (value - own) * run.sae.W_dec[feature]
        new[:, 0] = x[:, 0]  # the BOS, which the SAE was not trained on
        return (new, *out[1:]) if isinstance(out, tuple) else new

    found = run.steer(PROMPT, feature, strength, tokens=8)
    assert found.value == pytest.approx(value)
    assert found.steered == by_transformers(run, tiny_gpt2, hook)
    if strength:
        assert found.steered != found.plain


def test_a_feature_held_where_it_is_changes_nothing(run: LoadedRun, feature: int) -> None:
    silent = next(j for j in range(96) if not (run.features(PROMPT).values[:, j] > 0).any())
    text = run.features(PROMPT)
    assert float(text.values[text.valid, silent].abs().max()) == 0.0
    reader = run.reader
    ids = text.ids[None]
    x = reader.model.activations(ids.int()).float()
    assert torch.equal(_with_features(reader, {silent: 0.0})(ids)(x), x)
    moved = _with_features(reader, {silent: 2.0})(ids)(x) - x
    assert torch.equal(moved[0, 0], torch.zeros_like(moved[0, 0]))  # BOS
    torch.testing.assert_close(moved[0, 1:], 2.0 * run.sae.W_dec[silent].expand_as(moved[0, 1:]))


def test_two_features_at_once_change_what_each_of_them_changes(run: LoadedRun) -> None:
    reader, ids = run.reader, run.features(PROMPT).ids[None]
    x = reader.model.activations(ids.int()).float()
    first, second = (f.feature for f in run.features(PROMPT).top(2))

    def moved(values: dict[int, float]) -> torch.Tensor:
        return _with_features(reader, values)(ids)(x) - x

    both = moved({first: 3.0, second: 0.0})
    torch.testing.assert_close(both, moved({first: 3.0}) + moved({second: 0.0}))
    assert continuation(reader, PROMPT, {}, tokens=8) == run.steer(PROMPT, first, tokens=8).plain


@pytest.mark.parametrize("strength", [None, 0.0, 40.0])
def test_what_was_run_is_not_run_again_and_nothing_differs(
    run: LoadedRun, feature: int, strength: float | None
) -> None:
    """Growing with keys and values kept, against the whole text run for every token."""
    network = run.reader.model._network
    assert network.keeps_its_past
    value = (strength or 0.0) * float(run.per_feature["mean_activation"][feature])
    given = {} if strength is None else {feature: value}
    kept = continuation(run.reader, PROMPT, given, tokens=24)
    network.keeps_its_past = False
    try:
        assert continuation(run.reader, PROMPT, given, tokens=24) == kept != ""
    finally:
        network.keeps_its_past = True


def test_only_the_new_token_is_run(run: LoadedRun) -> None:
    growing = run.reader.model.growing()
    assert growing.logits(torch.tensor([[0, 5, 6]])).shape[1] == 3
    assert growing.logits(torch.tensor([[7]])).shape[1] == 1


def test_what_is_drawn_is_drawn_alike(run: LoadedRun, feature: int) -> None:
    first, again, other = (
        run.steer(PROMPT, feature, 5.0, tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again and first.plain != other.plain


def test_the_command_prints_both(
    folder: Path, feature: int, run: LoadedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(folder), PROMPT, "--feature", str(feature), "--strength", "40", "--tokens", "8"])
    said = capsys.readouterr().out
    found = run.steer(PROMPT, feature, 40.0, tokens=8)
    assert f"steered  : {PROMPT}|{found.steered}"[:40] in said and "as it is : " in said
    main([str(folder / "sae"), PROMPT, "--feature", "3", "--value", "1.5", "--tokens", "2"])
    assert "feature 3 at 1.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feature": 96}, "this SAE has 0 to 95"),
        ({"prompt": " "}, "the text is empty"),
        ({"tokens": 0}, "1 to 512 can be added"),
        ({"tokens": 500}, "positions"),
        ({"temperature": -1.0}, "0 or more"),
        ({"value": float("nan")}, "a finite number"),
    ],
)
def test_mistakes_are_one_line(run: LoadedRun, changes: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"prompt": PROMPT, "feature": 3, "value": 1.0, **changes}
    with pytest.raises(UserError) as raised:
        run.steer(given.pop("prompt"), given.pop("feature"), **given)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_strength_needs_a_mean(run: LoadedRun, folder: Path) -> None:
    dead = (run.per_feature["density"] == 0).nonzero().flatten().tolist()
    if dead:
        with pytest.raises(UserError, match="never fired on the held-out text"):
            run.steer(PROMPT, dead[0])
    with pytest.raises(UserError, match="a strength has no unit: give the value itself"):
        tcsae.open(folder / "sae").steer(PROMPT, 3)
