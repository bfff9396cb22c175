"""What must not change by accident: names of runs, configs, what a run and an export hold.

`python tests/golden/record.py` writes golden.json anew; a change of it is told in CHANGELOG.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

PRESETS = (
    "",
    "model=gemma window=16 lambda=0.2",
    "model=gpt2 layer=middle sae=batchtopk",
    "model=gemma3-270m sae=jumprelu training.target_l0=32",
    "sae=matryoshka consistency=first_group",
    "sae=tsae lambda=0",
    "sae=tfa training=long",
    "+experiment=effect",
    "+experiment=study",
    "+experiment=prior_art",
    "+experiment=seed_baseline",
    "consistency.variance_over=positions consistency.position_weight=0",
)


def keys(value: Any) -> Any:
    """The nested keys of JSON content; a list counts by its first element."""
    if isinstance(value, dict):
        return {key: keys(inner) for key, inner in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [keys(value[0])]
    return None


def configs() -> dict[str, Any]:
    """Name and resolved config of every preset above."""
    from tcsae.config import run_name
    from tcsae.config.compose import config_of

    found = {}
    for text in PRESETS:
        config = config_of(*text.split())
        content = json.loads(json.dumps(config.dump()))
        content.pop("store", None)  # where it lies is the machine's
        found[text] = {"name": run_name(config), "config": content}
    return found


def a_run(weights: Path, texts: Path, folder: Path) -> dict[str, Any]:
    """Keys and files of a small finished run and of its export."""
    from helpers import run_here, small_job

    from tcsae.jobs.export import export_run

    changes = {"store__dir": str(folder / "store"), "layer": "1", "evaluation__analysis": "true"}
    outcome = run_here(*small_job(weights, texts, folder / "run", **changes))
    assert outcome.code == 0, outcome.stderr
    export_run(folder / "run", folder / "export")

    def files(root: Path) -> list[str]:
        inner = (path for path in root.rglob("*") if path.is_file())
        return sorted(path.relative_to(root).as_posix() for path in inner)

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text())

    return {
        "run_files": files(folder / "run"),
        "export_files": files(folder / "export"),
        "sae_cfg": sorted(read("export/sae/cfg.json")),
        "final_info": keys(read("run/final_info.json")),
        "core": keys(read("run/eval/core.json")),
        "consistency": keys(read("run/eval/consistency.json")),
    }


def main() -> None:
    from helpers import write_texts, write_tiny_model

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_tiny_model("gpt2", folder / "gpt2")
        content = {
            "configs": configs(),
            "run": a_run(model, write_texts(folder / "texts"), folder),
        }
    (HERE / "golden.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
