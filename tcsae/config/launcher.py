"""Options of the launchers (hydra.launcher.KEY=VALUE). conf/hydra/launcher has the defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from tcsae.base.errors import UserError
from tcsae.config.strict import StrictModel

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Options(StrictModel):
    """Options that every launcher has."""

    pack: Count | Literal["auto"] = "auto"
    """Jobs that one process trains side by side on one stream of activations; auto: as many as
    fit into `device_memory_gb`, at most 16, spread over the processes there are."""
    device_memory_gb: Positive | None = None
    """Memory for a pack on its device; null: half of this machine's."""
    dry_run: bool = False
    """Print the jobs, their packing and their estimated cost, and stop."""
    compare: bool = True
    """Write the comparison page of the sweep when its last job has ended."""
    tflops: Positive | None = None
    """Sustained TFLOP/s of one device, for the estimate. null: where this machine's CPU does the
    work it is tried; elsewhere no hours are estimated."""
    bandwidth_gb_s: Positive | None = None
    """Sustained bandwidth of one device's memory, for the estimate; null: as `tflops`."""


class LocalOptions(Options):
    processes: Count = 2
    gpus: list[int] = []
    """GPUs to deal out to the processes; empty: they see what this process sees."""


class SlurmOptions(Options):
    """Options for sbatch, named as in submitit."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    timeout_min: Count = 240
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    cpus_per_task: Count = 8
    mem_gb: Positive | None = 32
    """null: memory is not asked for; mem_per_cpu and the like among `additional_parameters` stand
    for it."""
    array_parallelism: Count = 256
    """Array tasks that run at once, at most."""
    signal_delay_s: Count = 120
    """How long before the time limit the job is told to save."""
    setup: list[str] = []
    """Shell lines before the job (module load ..., source .../activate)."""
    additional_parameters: dict[str, Any] = {}
    """Further sbatch options by name, as {reservation: x}."""
    wait: bool = True
    """Stay until the last job has ended; false: submit and leave."""
    closing_partition: str | None = None
    """Where the comparison page is written; null: `partition`. It asks for no GPU."""
    poll_seconds: Positive = 5
    """How often the queue is looked at while waiting."""


Chosen = TypeVar("Chosen", bound=Options)


def checked(kind: type[Chosen], given: dict[str, Any]) -> Chosen:
    """Raises UserError, in one line, naming every option that is wrong."""
    # Hydra writes 32 where 32.0 is meant.
    try:
        return kind.model_validate(given, strict=False)
    except ValidationError as error:
        said = [
            f"hydra.launcher.{'.'.join(str(part) for part in detail['loc'][:1])} = "
            f"{detail['input']}: {detail['msg']}"
            for detail in error.errors()
        ]
        raise UserError("; ".join(dict.fromkeys(said))) from None
