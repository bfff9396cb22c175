"""SAEs that were not trained here: where they lie, what they say of themselves, what to measure
them on.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tcsae.base.errors import UserError
from tcsae.base.files import file_digest
from tcsae.config import (
    DatasetConfig,
    EvaluationConfig,
    LoadedConfig,
    Measured,
    ModelConfig,
    Source,
    parse_loaded,
)
from tcsae.config.compose import compose_tree, override_value
from tcsae.config.effect import refuse_without_effect
from tcsae.config.folder import conf_folder
from tcsae.config.strict import StrictModel
from tcsae.data.language_model import HOOKS
from tcsae.data.synthetic import HOOK as SYNTHETIC
from tcsae.data.vectors import HOOK as GIVEN
from tcsae.jobs.cautions import hub_name
from tcsae.jobs.facts import Facts, facts_of, part
from tcsae.runs.folder import load_any_sae
from tcsae.sae.base import SparseAutoencoder

_SETTABLE = tuple(Measured.model_fields)
_GROUPS = ("world",)
"""Groups whose keys are a part of another's."""
_HOOK = re.compile(r"blocks\.(\d+)\.(\w+)")
# Of a config of this package: an option of the group that all its keys can be set over, its keys,
# and those that the machine or the SAE's hook decide.
_OWN_PARTS: dict[str, tuple[str, type[StrictModel], tuple[str, ...]]] = {
    "model": ("other", ModelConfig, ("device", "device_map", "hook")),
    "dataset": ("files", DatasetConfig, ()),
    "evaluation": ("default", EvaluationConfig, ()),
}


@dataclass(frozen=True)
class ForeignSAE:
    """A loaded SAE, on raw activations, with what its files say."""

    sae: SparseAutoencoder
    source: Source
    facts: Facts
    cfg: dict[str, Any]
    """Content of its cfg.json or config.json."""

    def metadata(self, config: LoadedConfig) -> dict[str, Any]:
        """For the cfg.json of its copy: its own, and where it comes from."""
        own = part(self.cfg, "metadata")
        # The copy is in the format of the version that is written, whatever this one was in.
        kept = {k: v for k, v in own.items() if k != "sae_lens_version"}
        kept |= {"model_name": self.facts.model, "hook_name": self.facts.hook_name}
        kept["source"] = config.source.model_dump(mode="json")
        # NaN and infinity, which other libraries write, are no JSON.
        return json.loads(json.dumps(kept), parse_constant=lambda _: None)


def from_folder(folder: Path) -> ForeignSAE:
    """Raises UserError, in one line, for what is no SAE or cannot be computed here."""
    found = load_any_sae(folder)
    facts = facts_of(found)
    source = Source.model_validate(
        {
            "folder": str(folder),
            "sha256": file_digest(found.weights),
            "architecture": found.architecture,
            "library": "tcsae" if facts.own else found.library,
            "made_for": ", ".join(filter(None, (facts.model, facts.hook_name))) or None,
        }
    )
    return ForeignSAE(found.sae, source, facts, found.cfg)


def from_release(release: str, sae_id: str) -> ForeignSAE:
    """One of SAELens' pretrained SAEs, fetched and read by sae-lens.

    Raises UserError without sae-lens or the hub, for a release or an id that sae-lens does not
    know, and for an SAE that cannot be computed here.
    """
    try:
        from sae_lens import SAE
    except ImportError:
        raise UserError(
            "--release needs sae-lens: pip install 'sae-lens>=6.54,<7', or give a FOLDER"
        ) from None
    name = f"{release} {sae_id}"
    try:
        loaded = SAE.from_pretrained(release, sae_id, device="cpu")
    # sae-lens' own words for a name it does not know are good; what goes wrong on the way to the
    # hub has types that change with the versions of the libraries between.
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        own = type(error) is ValueError
        advice = "" if own else "; without the hub, give a FOLDER that holds the SAE"
        raise UserError(f"sae-lens cannot load {name}: {said}{advice}") from None
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_model(folder)
        try:
            found = from_folder(Path(folder))
        except UserError as error:
            raise UserError(str(error).replace(f"the SAE in {folder}", name)) from None
    source = found.source.model_copy(update={"folder": name, "pretrained": True})
    return replace(found, source=source)


# ---------------------------------------------------------------------- what to measure it on


def composed(found: ForeignSAE, overrides: Sequence[str]) -> LoadedConfig:
    """The config of the evaluation: conf/, what the SAE says of itself, and `overrides`.

    Raises UserError (or one of Hydra's errors) for a key that is not known or does not matter
    here, and for an SAE that does not say what it was made for.
    """

    chosen = [_key(override) for override in overrides]
    said = [text for text in _defaults(found.facts, chosen) if _key(text) not in chosen]
    # A file from elsewhere must not read this machine's environment.
    if strange := [text for text in said if "${" in text]:
        raise UserError(f"the SAE says {strange[0]} of itself, which is not taken: give that key")
    tree = compose_tree([*said, *overrides])
    tree = OmegaConf.masked_copy(tree, list(_SETTABLE))
    raw = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    assert isinstance(raw, dict)
    sae = found.sae.cfg
    raw["sae"] = {
        "architecture": sae.architecture,
        "d_sae": sae.d_sae,
        "k": getattr(sae, "k", None),
    }
    raw["source"] = found.source.model_dump(mode="json")
    config = parse_loaded({str(key): value for key, value in raw.items()})
    refuse_without_effect(config)
    return config


def _key(override: str) -> str:
    key = override.partition("=")[0].lstrip("+~")
    if "=" not in override or key.partition(".")[0] not in (*_SETTABLE, *_GROUPS):
        raise UserError(
            f"{override}: nothing is trained here; what can be set is key=value of "
            f"{', '.join(_SETTABLE)}"
        )
    return key


def _defaults(facts: Facts, chosen: Sequence[str]) -> Iterator[str]:
    """What the SAE says of itself, as overrides; UserError for what it must say and does not."""
    for group, (option, kind, without) in _OWN_PARTS.items():
        # Another option of the group has keys of its own.
        if facts.own and group not in chosen:
            yield f"{group}={option}"
            for name, value in part(facts.own, group).items():
                if name in kind.model_fields and name not in without:
                    yield f"++{group}.{name}={override_value(value)}"
    if facts.own and "window" in facts.own:
        yield f"window={override_value(facts.own['window'])}"
    if not facts.own and "model" not in chosen:
        if facts.model is None:
            raise UserError("the SAE does not say which model it was made for: give model=...")
        yield from _model(facts.model)
    if facts.context_size is not None:
        yield f"dataset.context_size={facts.context_size}"
    if facts.hook_name == GIVEN:
        raise UserError(
            "activations of one's own: what was measured of a run is in its folder, and "
            "tcsae.evaluate reads activations of language models alone"
        )
    if not {"layer", "model.hook"} <= set(chosen) and facts.hook_name != SYNTHETIC:
        yield from _place(facts.hook_name, chosen)


def _place(hook_name: str | None, chosen: Sequence[str]) -> Iterator[str]:
    if hook_name is None:
        if "layer" in chosen:
            return  # at the model's own default hook, as a run would be
        raise UserError("the SAE does not say which layer it was made for: give layer=...")
    place = _HOOK.fullmatch(hook_name)
    hooks = {name: hook for hook, name in HOOKS.items()}
    if place is None or place[2] not in hooks:
        raise UserError(
            f"the SAE was made for {hook_name}, which is not read here: only "
            f"{', '.join(f'blocks.N.{name}' for name in hooks)} are (layer=N model.hook=... "
            "measure it at one of them all the same)"
        )
    yield f"layer={place[1]}"
    yield f"++model.hook={hooks[place[2]]}"


def _model(name: str) -> Iterator[str]:
    """The option of conf/model that has this model, by any of the names that SAELens uses."""

    named = {}
    for file in sorted((conf_folder() / "model").glob("*.yaml")):
        # Unresolved: a name may be made from keys of other groups.
        content = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(content, dict)
        named[(content.get("model") or content).get("name")] = file.stem
    if name not in named:
        name = hub_name(name)
    if name in named:
        yield f"model={named[name]}"
    else:
        yield from ("model=other", f"model.name={override_value(name)}")
