"""The files of a run by name, and where runs are. Every name stands here and nowhere else.

On the ground floor because the log, the training and the evaluation write into a run's folder too.
It needs the standard library only, so that looking at a thousand runs is quick.
`tcsae.runs.folder.RunFolder` adds what needs torch: claiming a folder and reading a run back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

SWEEP_FILE = "sweep.json"
STARTS = ".starts.json"
"""Beside a pack's file: how often its job was started without having saved anything."""
STUDY_FILE = "study.jsonl"
"""Of an adaptive sweep: Optuna's journal, a line of JSON for each thing that happened."""
STUDY_LOCK = ".study.jsonl.lock"
REPORT = "report.html"
"""The page of a run, and of a comparison."""
FEATURES_FOLDER = "report_features"
"""Beside the page of a run with many features: what is read when one of them is opened."""
NOTES = "notes.txt"
"""The words of a run, and of a comparison."""
STABILITY = "stability.safetensors"
"""Of a comparison."""
OVERRIDES = "overrides.yaml"
ACTIVATIONS = "activations"
"""In store.dir: the folders of activations, each with its identity."""
IDENTITY = "identity.json"


class EvalFiles:
    """What a run measures of its SAE."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.core = self.path / "core.json"
        self.consistency = self.path / "consistency.json"
        self.per_feature = self.path / "per_feature.safetensors"
        self.per_context = self.path / "per_context.safetensors"
        self.draws = self.path / "draws.safetensors"
        self.by_density = self.path / "by_density.safetensors"
        # Of the instruments that were asked for (tcsae/meaning).
        self.meaning = self.path / "meaning.json"
        # Of a synthetic world alone.
        self.truth = self.path / "truth.json"
        self.truth_per_feature = self.path / "truth.safetensors"


class AnalysisFiles:
    """What a run finds in its features."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.redundancy = self.path / "redundancy.json"
        self.specialization = self.path / "specialization.json"
        self.top_contexts = self.path / "top_contexts.safetensors"
        self.top_tokens = self.path / "top_contexts.json"
        self.correlation = self.path / "correlation.safetensors"
        self.document = self.path / "document.safetensors"
        self.logit_lens = self.path / "logit_lens.safetensors"

    @property
    def is_there(self) -> bool:
        """Whether the analysis was made; its last file says so."""
        return self.specialization.is_file()


class RunFiles:
    """The paths of the run in a folder, and what their presence says."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.content = self.path / "content.json"
        self.state = self.path / "state.json"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "train.log"
        self.final_info = self.path / "final_info.json"
        self.report = self.path / REPORT
        self.report_features = self.path / FEATURES_FOLDER
        self.notes = self.path / NOTES
        self.lock = self.path / ".lock"
        self.checkpoints = self.path / "checkpoint"
        self.hydra = self.path / ".hydra"
        self.overrides = self.hydra / OVERRIDES
        self.sae = self.path / "sae"
        # SAELens' own names (tcsae/sae/formats/saelens.py), for readers without torch.
        self.sae_cfg = self.sae / "cfg.json"
        self.sae_weights = self.sae / "sae_weights.safetensors"
        self.eval = EvalFiles(self.path / "eval")
        self.analysis = AnalysisFiles(self.path / "analysis")
        self.wandb_ids = self.path / "wandb_ids.json"
        """The run's ids in W&B, where they are not its own."""
        self.export_mark = self.path / "export.json"
        """The file that only an export has."""

    @property
    def marks(self) -> tuple[Path, ...]:
        """Files that only a run has. The state comes first in time: a queued run has no other."""
        return self.config, self.state, self.metrics, self.final_info

    @property
    def is_run(self) -> bool:
        return any(file.is_file() for file in self.marks)

    @property
    def is_begun(self) -> bool:
        """Whether a process has ever worked here; a queued run's folder has only its state."""
        return self.config.is_file()

    @property
    def is_finished(self) -> bool:
        return self.final_info.is_file()

    @property
    def has_results(self) -> bool:
        """Whether there is anything to lose. A run refused before its first checkpoint has none."""
        return any(path.exists() for path in (self.checkpoints, self.sae, self.final_info))

    @property
    def has_pages(self) -> bool:
        return self.notes.is_file()  # the last of the pages


def is_sweep(folder: Path) -> bool:
    return (folder / SWEEP_FILE).is_file()


def runs_below(folder: Path, sweeps: bool = False) -> Iterator[Path]:
    """The folders of the runs in or below `folder`, by name.

    With `sweeps`, a sweep's own folder stands for its runs: it also knows those not begun.
    Hidden folders and links are not entered.
    """
    if (sweeps and is_sweep(folder)) or RunFiles(folder).is_run:
        yield folder
        return
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
            yield from runs_below(inner, sweeps)
