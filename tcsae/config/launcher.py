"""Options of the launchers (hydra.launcher.KEY=VALUE). conf/hydra/launcher has the defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from tcsae.base.errors import UserError
from tcsae.config.strict import StrictModel

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class Options(StrictModel):
    """Options that every launcher has."""

    pack: Count | Literal["auto"] = "auto"
    """Jobs that one process trains side by side on one stream of activations; auto: as many as
    fit into `device_memory_gb`, at most 16, spread over the processes there are. On Slurm: those of
    one Slurm job, whose tasks share them out; auto fills every task."""
    device_memory_gb: Positive | None = None
    """Memory for a pack on its device; null: half of this machine's."""
    dry_run: bool = False
    """Print the jobs, their packing and their estimated cost, and stop."""
    prepare: Literal["text", "activations"] | None = None
    """Fetch weights, pack the text and, if asked for, harvest the activations, and stop."""
    compare: bool = True
    """Write the comparison page of the sweep when its last job has ended."""
    tflops: Positive | None = None
    """Sustained TFLOP/s of one device, for the estimate. null: where this machine's CPU does the
    work it is tried; elsewhere no hours are estimated."""
    bandwidth_gb_s: Positive | None = None
    """Sustained bandwidth of one device's memory, for the estimate; null: as `tflops`."""

    @property
    def trains_nothing(self) -> bool:
        return self.dry_run or self.prepare is not None

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        if self.dry_run and self.prepare:
            raise ValueError("dry_run and prepare: one says what the other does; take one of them")
        if self.bandwidth_gb_s is not None and self.tflops is None:
            raise ValueError("bandwidth_gb_s does nothing without tflops: give both, or none")
        if type(self) is not SlurmOptions and self.device_memory_gb and self.pack != "auto":
            raise ValueError("device_memory_gb is for pack=auto: leave one of them out")
        return self


class LocalOptions(Options):
    processes: Count = 2
    gpus: list[int] = []
    """GPUs to deal out to the processes; empty: they see what this process sees."""

    @model_validator(mode="after")
    def _every_gpu_has_a_process(self) -> Self:
        if len(self.gpus) > self.processes:
            raise ValueError(
                f"gpus has {len(self.gpus)} and processes is {self.processes}: GPUs would be idle, "
                f"take processes={len(self.gpus)}"
            )
        return self


class SlurmOptions(Options):
    """Options for sbatch, named as in submitit."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    timeout_min: Count = 240
    nodes: Count = 1
    """Machines for each pack."""
    tasks_per_node: Count | None = None
    """Processes ("ranks") for each pack on a node; null: one for each GPU, one without GPUs. A
    pack's jobs are spread over them, and one job alone is trained by all."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    cpus_per_task: Count = 8
    mem_gb: Positive | None = 32
    """Of a node, for all its tasks. null: memory is not asked for; mem_per_cpu and the like among
    `additional_parameters` stand for it."""
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
    max_retries: Annotated[int, Field(ge=0)] = 5
    """How often in a row a job is started again without having saved anything in between (nodes
    that fail, preemption before the first save); then it has failed."""
    poll_seconds: Positive = 5
    """How often the queue is looked at while waiting."""

    @model_validator(mode="after")
    def _nothing_is_set_in_vain(self) -> Self:
        tasks, gpus = self.tasks_per_node, self.gpus_per_node
        if tasks is not None and 1 < tasks > gpus > 0:
            raise ValueError(
                f"tasks_per_node is {tasks} and gpus_per_node {gpus}: every task takes a GPU of "
                f"its own, ask for gpus_per_node={tasks}"
            )
        # One task may spread a language model over them (model.device_map).
        if tasks is not None and 1 < tasks < gpus:
            raise ValueError(
                f"gpus_per_node is {gpus} and tasks_per_node {tasks}: GPUs would be idle, leave "
                "tasks_per_node out"
            )
        if self.closing_partition is not None and not self.compare:
            raise ValueError("closing_partition does nothing with compare=false: leave it out")
        if self.poll_seconds != 5 and not self.wait:
            raise ValueError("poll_seconds does nothing with wait=false: leave it out")
        return self


Chosen = TypeVar("Chosen", bound=StrictModel)


def checked(kind: type[Chosen], given: dict[str, Any], node: str = "hydra.launcher") -> Chosen:
    """Raises UserError, in one line, naming every option that is wrong."""
    # Hydra writes 32 where 32.0 is meant.
    try:
        return kind.model_validate(given, strict=False)
    except ValidationError as error:
        said = [_in_words(detail, node) for detail in error.errors()]
        raise UserError("; ".join(dict.fromkeys(said))) from None


def _in_words(detail: Any, node: str) -> str:
    key, message = detail["loc"][:1], detail["msg"].removeprefix("Value error, ")
    return f"{node}.{key[0]} = {detail['input']}: {message}" if key else f"{node}: {message}"
