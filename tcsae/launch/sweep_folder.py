"""A sweep's own folder: `sweep.json` says which jobs it has and where they were sent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcsae.base.files import make_folder, read_json, write_json
from tcsae.base.run_files import SWEEP_FILE
from tcsae.config import run_id
from tcsae.launch.jobs import GridJob

PACKS = ".packs"
"""Where packs, submission files and the logs of their processes are."""


@dataclass(frozen=True)
class SweepFolder:
    path: Path
    """Absolute."""

    @property
    def name(self) -> str:
        return self.path.name

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs that were ever launched into the folder, as `describe` wrote them."""
        file = self.path / SWEEP_FILE
        return read_json(file)["jobs"] if file.is_file() else []

    def describe(self, jobs: Sequence[GridJob], launcher: str, command: Sequence[str]) -> None:
        """Write `sweep.json`, with the jobs and the submissions that there were before."""
        make_folder(self.path)
        file = self.path / SWEEP_FILE
        before = read_json(file) if file.is_file() else {}
        numbers = {job.number for job in jobs}
        older = [job for job in before.get("jobs", []) if job["number"] not in numbers]
        now = [
            {
                "number": job.number,
                "run_id": run_id(job.config),
                "name": job.name,
                "overrides": list(job.overrides),
                "folder": str(job.folder.relative_to(self.path)),
            }
            for job in jobs
        ]
        write_json(
            file,
            {
                "name": self.name,
                "created": before.get("created", time.time()),
                "command": list(command),
                "launcher": launcher,
                "jobs": sorted(older + now, key=lambda job: job["number"]),
                "submissions": before.get("submissions", []),
            },
        )

    def submissions(self) -> list[dict[str, Any]]:
        """What was sent so far, the oldest first."""
        file = self.path / SWEEP_FILE
        return read_json(file)["submissions"] if file.is_file() else []

    def add_submission(
        self,
        packs: Sequence[Sequence[GridJob]],
        job_ids: Sequence[str | None],
        closing_job_id: str | None = None,
        folder: Path | None = None,
    ) -> None:
        """`folder`: where the launcher keeps what it needs to find the jobs again."""
        content: dict[str, Any] = read_json(self.path / SWEEP_FILE)
        content["submissions"].append(
            {
                "time": time.time(),
                "packs": [
                    {"jobs": [job.number for job in pack], "job_id": job_id}
                    for pack, job_id in zip(packs, job_ids, strict=True)
                ],
                "closing_job_id": closing_job_id,
                "folder": str(folder.relative_to(self.path)) if folder else None,
            }
        )
        write_json(self.path / SWEEP_FILE, content)
