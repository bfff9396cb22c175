"""A run's activations as delphi's cache has them, for its explanations and scores.

delphi (EleutherAI, automatic interpretation) explains features from folders that its `LatentCache`
writes; `LatentDataset(raw_dir=FOLDER/latents, ...)` reads this one:

    latents/HOOK/config.json            model_name, ctx_len and where the text is from
    latents/HOOK/FIRST_LAST.safetensors features FIRST to LAST:
        locations    [n, 3] uint16 or uint32: context, position, feature - FIRST
        activations  [n] float32
        tokens       [contexts, T] int64

Text and masks are those of the evaluation: held-out contexts, and nothing at special, first and
massive tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.base.files import atomic, honour_umask, make_folder, write_json
from tcsae.base.signals import stop_on_signal
from tcsae.data.stream import open_held_out
from tcsae.measure.text_features import coded
from tcsae.runs.folder import LoadedRun, load_run

LATENTS = "latents"
"""The folder for delphi's raw_dir; nothing but hooks may lie in it."""
SPLITS = 5
"""Files a hook, as delphi's own default."""
_SMALL = 1 << 16


def export_for_delphi(run: Path, output: Path) -> Path:
    """Write what delphi reads of the finished run in `run` into `output`, new or empty.

    Raises UserError: no finished run, no language model, `output` is not empty, weights or text
    that are not there.
    """
    loaded, output = load_run(run), Path(output)
    if (why := loaded.config.model.why_no_text) is not None:
        raise UserError(f"{why}: there is no text")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not an empty folder: choose another")
    ids, locations, values, hook = _fired(loaded)
    folder = make_folder(output / LATENTS / hook)
    bounds = torch.linspace(0, loaded.sae.d_sae, SPLITS + 1).long().tolist()
    for first, after in zip(bounds[:-1], bounds[1:], strict=True):
        if first == after:
            continue  # fewer features than files
        mine = (locations[:, 2] >= first) & (locations[:, 2] < after)
        here = locations[mine] - torch.tensor([0, 0, first])
        _write(folder / f"{first}_{after - 1}.safetensors", here, values[mine], ids)
    dataset = loaded.config.dataset
    write_json(
        folder / "config.json",
        {
            "model_name": loaded.config.model.name,
            "ctx_len": ids.shape[1],
            "cache_ctx_len": ids.shape[1],
            "n_tokens": ids.numel(),
            "n_splits": SPLITS,
            "batch_size": 1,
            # Not read where the files have the tokens, as these have.
            "dataset_repo": dataset.name,
            "dataset_split": "held-out",
            "dataset_name": "",
            "dataset_column": dataset.text_field,
        },
    )
    return output


def _fired(run: LoadedRun) -> tuple[Tensor, Tensor, Tensor, str]:
    """ids [N, T], places [n, 3] and values [n] at which a feature is on, and the hook's name."""
    reader = run.reader  # refuses weights that are no longer the run's
    with stop_on_signal() as stop, torch.no_grad():
        model, batches = open_held_out(run.config, reader.norm_limit, stop)
        ids, locations, values = [], [], []
        for i, (row, valid, _, codes) in enumerate(coded(reader.sae.to(batches.device), batches)):
            stop.check()
            at, feature = codes.coalesce().indices()
            on = valid[at] & (codes.coalesce().values() > 0)
            ids.append(row)
            locations.append(torch.stack([torch.full_like(at, i), at, feature], dim=1)[on])
            values.append(codes.coalesce().values()[on])
    return torch.stack(ids), torch.cat(locations), torch.cat(values), model.hook_name


def _write(path: Path, locations: Tensor, values: Tensor, ids: Tensor) -> None:
    from safetensors.numpy import save

    small = not len(locations) or int(locations.max()) < _SMALL
    content = {
        "locations": locations.numpy().astype("uint16" if small else "uint32"),
        "activations": values.numpy(),
        "tokens": ids.numpy(),
    }
    with atomic(path) as temporary:
        temporary.write_bytes(save(content))
        honour_umask(temporary)
