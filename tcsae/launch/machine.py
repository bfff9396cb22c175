"""What a machine is assumed to sustain, and how long a piece of work takes there. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Machine:
    """The rates that one process is assumed to sustain, and what `auto` comes to there."""

    tflops: float | None
    """Products in bfloat16. None: hours are not estimated."""
    bandwidth_gb_s: float | None
    """Of the device's memory. None: hours are not estimated."""
    device: str = "cuda"
    name: str = ""
    bfloat16: bool = True
    """Whether `auto` means bfloat16, for the model and the SAE's products."""
    disk_gb_s: float = 1.0
    """The store's file system, as one process sees it."""
    hash_gb_s: float = 1.8
    """SHA-256 of shards and checkpoints, one core. Measured."""
    launch_us: float = 10.0
    """From one small kernel to the next. 7 measured without a GPU."""
    float32: float | None = None
    """TFLOP/s of products in float32. None: a share of `tflops`."""
    is_measured: bool = False
    """Whether products and bandwidth were tried on the machine at hand."""
    cores: int | None = None
    """That a process has. None: not known."""
    page_cache_gb: float = 64.0
    """A store up to this size is read from disk once, a larger one once an epoch more."""

    @property
    def has_rates(self) -> bool:
        return self.tflops is not None and self.bandwidth_gb_s is not None

    @property
    def float32_tflops(self) -> float:
        """Products in float32, without TF32 (on A100 and H100 70 % of the peaks, 19.5 and 67)."""
        assert self.tflops is not None
        return self.float32 or self.tflops / (4 if self.device == "cpu" else 11)


MACHINES = {
    # Half of the dense bfloat16 peak (312 and 989 TFLOP/s) for bare products, 70 % of the memory's
    # bandwidth (2039 and 3350 GB/s) beside them.
    "a100": Machine(156, 1430, name="A100"),
    "h100": Machine(495, 2345, name="H100"),
    # What a bare product and a bare multiplication reach on the two cores of docs/scaling.md.
    "cpu": Machine(0.85, 32, device="cpu", name="2 CPU cores", page_cache_gb=16),
}


class Work(NamedTuple):
    """One kind of work: on the device products, bytes and launches, then disk and host on top."""

    what: str
    flops: float = 0.0
    """Products at the machine's bfloat16 rate."""
    float32_flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    disk_bytes: float = 0.0
    hash_bytes: float = 0.0
    host_seconds: float = 0.0

    def times(self, n: float, what: str = "") -> Work:
        return Work(what or self.what, *(n * value for value in self[1:]))

    def plus(self, other: Work, n: float = 1.0) -> Work:
        return Work(self.what, *(a + n * b for a, b in zip(self[1:], other[1:], strict=True)))

    def seconds(self, machine: Machine) -> float:
        assert machine.tflops is not None and machine.bandwidth_gb_s is not None
        products = self.flops / machine.tflops + self.float32_flops / machine.float32_tflops
        moved = self.bytes / machine.bandwidth_gb_s
        device = max(products / 1e12 + moved / 1e9, self.kernels * machine.launch_us / 1e6)
        disk = self.disk_bytes / machine.disk_gb_s + self.hash_bytes / machine.hash_gb_s
        return device + disk / 1e9 + self.host_seconds


Stage = tuple[Work, ...]
