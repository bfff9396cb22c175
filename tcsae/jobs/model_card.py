"""The model card of an exported SAE, made from what its run measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tcsae.base.labels import (
    from_documents,
    interval_text,
    interval_words,
    label,
    markdown_table,
    number,
    window_part,
)
from tcsae.base.printable import printable
from tcsae.runs.folder import LoadedRun

_FIGURES = ("explained_variance", "l0", "ce_loss_score", "kl_div_score", "frac_alive")
# Of the architectures that an export can have, those that sae-lens has a class for.
_SAELENS_HAS = ("standard", "topk", "jumprelu", "gated", "temporal")
# What the hub takes for a model's or a data set's name; a folder is neither.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(run: LoadedRun, sae_cfg: Mapping[str, Any], hub_name: str | None = None) -> str:
    """README.md of the export; `sae_cfg` is the content of its sae/cfg.json."""
    config, architecture = run.training_config, run.config.sae.architecture
    name, layer = config.model.name, run.final_info["layer"]
    title = f"{architecture} SAE, {quoted(name)}, block {layer} {config.model.hook}"
    parts = [
        _front_matter(run),
        f"# {title}",
        "A sparse autoencoder trained with "
        "tcsae (temporal-consistency sparse autoencoders). It takes raw activations and gives "
        "them back in the same units.",
        markdown_table(("", ""), _settings(run, sae_cfg)),
        "## Measured on held-out text",
        _measured(run),
        markdown_table(("metric", "value", "interval", "meaning"), _figures(run)),
        "All figures: `eval/core.json` (SAEBench's format) and `eval/consistency.json`.",
        "## How to load it",
        _loading(hub_name, sae_cfg["architecture"]),
        "## Licence",
        "This card grants none: whoever publishes the SAE chooses one and writes it here. Its "
        f"weights come from activations of {quoted(name)} on the text "
        f"{quoted(config.dataset.name)}; the terms "
        "of both may bind what is made from them.",
        "## Configuration",
        "The whole of it is in `config.json`; this is the SAE's and the training's part.",
        f"```yaml\n{_configuration(run)}```",
    ]
    return "\n\n".join(parts) + "\n"


def quoted(text: str) -> str:
    """A name that somebody chose, as code: nothing of it becomes markup."""
    plain = printable(" ".join(str(text).split())).replace("|", "\u00a6") or " "
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    space = " " if "`" in plain else ""
    return f"{fence}{space}{plain}{space}{fence}"


def _front_matter(run: LoadedRun) -> str:
    """The YAML block that the hub reads."""
    content: dict[str, Any] = {
        "library_name": "saelens",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", "tcsae"],
    }
    if run.config.model.path is None and _HUB_NAME.fullmatch(run.config.model.name):
        content["base_model"] = run.config.model.name
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _settings(run: LoadedRun, sae_cfg: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    config = run.training_config
    form = config.loss_words + (
        ", positions shuffled (control)" if config.consistency.shuffle_positions else ""
    )
    metadata = sae_cfg.get("metadata", {})
    rows = [
        ("model", quoted(config.model.name)),
        ("layer", str(run.final_info["layer"])),
        ("hook", quoted(metadata.get("hook_name") or config.model.hook)),
        ("text", quoted(config.dataset.name)),
        ("context size", f"{config.dataset.context_size} tokens"),
        ("architecture", config.sae.architecture),
        ("features", f"{run.sae.d_sae:,} on {run.sae.d_in:,} dimensions"),
        ("temporal loss", f"{form}; window {config.window}; lambda {config.lambda_:g}"),
        *([("trained on", config.averaged)] if config.averaged else []),
        ("training tokens", f"{run.final_info.get('tokens', config.training.tokens):,}"),
        ("seed", str(config.seed)),
        ("run", str(run.final_info.get("unique_id", "n/a"))),
    ]
    if metadata.get("norm_limit"):
        left_out = f"tokens with a norm above {number(metadata['norm_limit'])} (massive ones)"
        rows.append(("not trained on", left_out))
    return rows


def _measured(run: LoadedRun) -> str:
    summary = run.consistency["summary"]
    return (
        f"{summary['n_valid_tokens']:,} tokens in {summary['n_contexts']:,} contexts"
        f"{from_documents(summary)}. {interval_words(summary)}"
    )


def _figures(run: LoadedRun) -> Sequence[tuple[str, ...]]:
    groups = run.core["eval_result_metrics"].values()
    core = {name: value for group in groups for name, value in group.items()}
    intervals = (run.core.get("eval_result_unstructured") or {}).get("intervals") or {}
    rows = [
        (label(n).name, number(core.get(n)), interval_text(intervals.get(n)), label(n).meaning)
        for n in _FIGURES
    ]
    for name, entry in run.consistency["summary"]["metrics"].items():
        part = window_part(name)
        if part and (part.kind == "C" or entry["energy_weighted"] is not None):
            interval = interval_text(entry.get("energy_weighted_interval"))
            value = number(entry["energy_weighted"])
            rows.append((label(name).name, value, interval, label(name).meaning))
    return rows


def _loading(hub_name: str | None, architecture: str) -> str:
    fetch, folder = "", '"FOLDER"'
    if hub_name is not None:
        fetch = "from huggingface_hub import snapshot_download\n"
        folder = f'snapshot_download("{hub_name}")'
    register = ""
    if architecture not in _SAELENS_HAS:
        register = "import tcsae\n\ntcsae.register_with_saelens()  # sae-lens has no such class\n"
    return f"""With tcsae:

```python
{fetch}import tcsae

folder = {folder}
sae = tcsae.load_sae(folder)
features = sae.encode(activations)  # [..., d_in] -> [..., d_sae]
```

With sae-lens 6:

```python
{fetch}from sae_lens import SAE
{register}
folder = {folder}
sae = SAE.load_from_disk(f"{{folder}}/sae")
```"""


def _configuration(run: LoadedRun) -> str:
    whole = run.config.dump()
    chosen = {key: whole[key] for key in ("sae", "consistency", "training")}
    return yaml.safe_dump(chosen, sort_keys=False)
