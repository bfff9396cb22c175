"""Operations, bytes and memory of one job, counted from its config and its model's shape.

The tests count real steps, forward passes and evaluations, and hold the formulas to them. "Passes"
are bytes read and written per element by one kernel after another; s are the bytes of a number.

Shapes: T positions a context, N tokens a step, D = d_in, F = d_sae, k entries a token (topk), P
parameters of an SAE, K = evaluation.max_lag, G bootstrap blocks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tcsae.config import Config
from tcsae.config.sae import SAEConfig
from tcsae.launch.model_facts import ModelFacts

# Of a training step.
WEIGHT_PASSES, SPARSE_WEIGHT_PASSES = 150, 120
"""Over [D, F]: Adam (56), gradients, clipping, the decoder's projection and norm, casts: 135 to
165 dense, by architecture."""
INPUT_PASSES = 115
"""Over [N, D]."""
LOGGED_PASSES = 88
"""More over [N, F] and [N, D] where metrics are logged."""
LAPLACIAN_PASSES, POSITION_PASSES = 80, 40
"""Over [N, T], for the temporal loss, and over [T, F], for its position term."""
ENTRY_BYTES, ENTRY_PENALTY_BYTES = 440, 330
"""Sparse codes: sorting and moving an entry, and its part of the temporal loss."""
PENALTIES = {"scale_free": (29, 120), "slow": (27, 120), "window_variance": (16, 40)}
"""Passes over dense [N, F], and kernels, of the forms of the temporal loss that cost something."""
STEP_KERNELS, LOGGED_KERNELS = 115, 75
SPARSE_FROM_RATIO = 16
"""As in tcsae/sae/fast.py."""

# Of the language model and the evaluation.
BLOCK_KERNELS = 33
G = 64
ENCODE_CONTEXTS = 16
LOGITS = 2**27
"""As in tcsae/measure/evaluation.py: elements of one logits tensor."""
DENSE_PAIRS, SPARSE_PAIRS = 2**28, 2**33
"""As in tcsae/measure/analysis_pass.py."""
CLOSE_FEATURES = 8192
"""As in tcsae/measure/analysis_pass.py."""
REPORT_SECONDS, PAIR_SECONDS = 12.0, 17e-9
"""Clusters, pages and the like of one run on the host; one pair's correlation. Measured."""

# Assumed.
DEAD_SHARE = 0.05
"""Dead features on average: AuxK's cost follows their number."""
USUAL_L0 = 64
"""Features a token, of architectures without a k."""


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
    page_cache_gb: float = 64.0
    """A store up to this size is read from disk once, a larger one once an epoch more."""

    @property
    def has_rates(self) -> bool:
        return self.tflops is not None and self.bandwidth_gb_s is not None

    @property
    def float32_tflops(self) -> float:
        """Products in float32, without TF32 (on A100 and H100 70 % of the peaks, 19.5 and 67)."""
        assert self.tflops is not None
        return self.tflops / (4 if self.device == "cpu" else 11)


MACHINES = {
    # Half of the dense bfloat16 peak (312 and 989 TFLOP/s) for bare products, 70 % of the memory's
    # bandwidth (2039 and 3350 GB/s) beside them: together about 35 % of the peak.
    "a100": Machine(156, 1430, name="A100"),
    "h100": Machine(495, 2345, name="H100"),
    # What a bare product and a bare multiplication reach on the two cores of docs/scaling.md.
    "cpu": Machine(0.85, 32, device="cpu", name="2 CPU cores", page_cache_gb=16),
}


class Work(NamedTuple):
    """One kind of work: on the device its slowest rate decides, disk and host come on top."""

    what: str
    flops: float = 0.0
    """Products at the machine's bfloat16 rate."""
    float32_flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    disk_bytes: float = 0.0
    hash_bytes: float = 0.0
    host_seconds: float = 0.0

    def seconds(self, machine: Machine) -> float:
        assert machine.tflops is not None and machine.bandwidth_gb_s is not None
        products = self.flops / machine.tflops + self.float32_flops / machine.float32_tflops
        device = max(
            products / 1e12,
            self.bytes / machine.bandwidth_gb_s / 1e9,
            self.kernels * machine.launch_us / 1e6,
        )
        disk = self.disk_bytes / machine.disk_gb_s + self.hash_bytes / machine.hash_gb_s
        return device + disk / 1e9 + self.host_seconds


Stage = tuple[Work, ...]


@dataclass(frozen=True)
class Sizes:
    """The numbers of a job that the formulas use."""

    N: int
    T: int
    D: int
    F: int
    P: int
    steps: int
    s: int
    """Bytes of a number in the SAE's products."""
    model_s: int
    """Bytes of a number in the language model and in the store."""
    is_sparse: bool
    """topk, batchtopk: the products after the selection touch the chosen entries only."""
    penalty: tuple[int, int]
    """Of PENALTIES, or zeros."""
    entries: int
    """k, or USUAL_L0."""


def sizes(config: Config, facts: ModelFacts, machine: Machine) -> Sizes:
    cfg, sae = config.training, config.sae
    k = getattr(sae, "k", None)

    def bytes_each(wanted: str) -> int:
        return 2 if wanted == "bfloat16" or (wanted == "auto" and machine.bfloat16) else 4

    sparse_possible = sae.architecture in ("topk", "batchtopk") and machine.device == "cpu"
    return Sizes(
        N=cfg.batch_contexts * config.dataset.context_size,
        T=config.dataset.context_size,
        D=facts.d_model,
        F=sae.d_sae,
        P=parameters(sae, facts.d_model),
        steps=config.steps,
        s=bytes_each(cfg.precision),
        model_s=bytes_each(config.model.dtype),
        is_sparse=sparse_possible and k is not None and SPARSE_FROM_RATIO * k <= sae.d_sae,
        penalty=PENALTIES.get(config.consistency.form, (0, 0)) if config.lambda_ > 0 else (0, 0),
        entries=k or USUAL_L0,
    )


def _products(what: str, flops: float, s: int, **other: float) -> Work:
    """Products of numbers of s bytes."""
    if s == 4:
        return Work(what, float32_flops=flops, **other)
    return Work(what, flops=flops, **other)


# ------------------------------------------------------------------------------ language model


def forward_flops(
    facts: ModelFacts, n_blocks: int, context_size: int, logits: bool = False
) -> float:
    """Products per token; attention as it is computed, without a causal half."""
    attention = 4 * context_size * facts.n_heads * facts.d_head
    blocks = n_blocks * (2 * facts.block_parameters + attention)
    return blocks + (2 * facts.d_model * facts.d_vocab if logits else 0)


def forward_bytes(facts: ModelFacts, n_blocks: int, context_size: int, s: int) -> float:
    """Read and written per token beside the weights."""
    # None where attention is one kernel, 40 where it is not (gemma-2): little of either whole.
    scores = 8 * context_size * facts.n_heads
    return n_blocks * (50 * (s + 2) * facts.d_model + 8 * s * facts.d_mlp + scores)


def forward_stage(
    config: Config, facts: ModelFacts, z: Sizes, tokens: float, n_blocks: int | None, what: str
) -> Stage:
    """`tokens` through the first `n_blocks` of the model; None: through all, to the logits."""
    logits, n_blocks = n_blocks is None, facts.n_layers if n_blocks is None else n_blocks
    passes = tokens / (config.model.forward_contexts * z.T)
    weights = passes * n_blocks * facts.block_parameters * z.model_s
    activations = tokens * forward_bytes(facts, n_blocks, z.T, z.model_s)
    flops = tokens * forward_flops(facts, n_blocks, z.T, logits)
    kernels = passes * (n_blocks * BLOCK_KERNELS + 20) / 2
    return (
        _products(what, flops, z.model_s, bytes=weights, kernels=kernels),
        Work(f"{what}, beside its products", bytes=activations, kernels=kernels),
    )


# ------------------------------------------------------------------------------------ training


def parameters(sae: SAEConfig, d_in: int) -> int:
    """P: two matrices, the vectors over features that the architecture has, b_dec; attention."""
    vectors = {"gated": 3, "jumprelu": 2, "persistent": 2, "tfa": 2}.get(sae.architecture, 1)
    return 2 * d_in * sae.d_sae + vectors * sae.d_sae + d_in + attention_parameters(sae)


def attention_parameters(sae: SAEConfig) -> int:
    """tfa's: values and their projection are [d_sae, d_sae], queries and keys narrower."""
    if (bottleneck := getattr(sae, "bottleneck_factor", None)) is None:
        return 0
    return 2 * sae.d_sae**2 + 2 * sae.d_sae**2 // bottleneck


def step_flops(config: Config, z: Sizes, dead_share: float = DEAD_SHARE) -> float:
    """Products of one training step: five [N, D, F] if dense, else the encoder's and k rows."""
    dense = {"gated": 7, "tfa": 11}.get(config.sae.architecture, 5)
    flops = 2.0 * dense * z.N * z.D * z.F
    if attention := attention_parameters(config.sae):
        flops += 6.0 * z.N * (attention + z.T * z.F)
    if z.is_sparse:
        flops = 2.0 * z.N * z.D * z.F + 8.0 * z.N * z.entries * z.D
    if config.sae.revival == "auxk":
        flops += 10 * z.N * z.D * dead_share * z.F
    if any(z.penalty):
        flops += z.N * (2 * z.T * z.entries if z.is_sparse else (2 * z.T + 6) * z.F)
    return flops


def step_bytes(config: Config, z: Sizes, dead_share: float = DEAD_SHARE) -> tuple[float, float]:
    """(activations, weights) read and written by one training step."""
    if z.is_sparse:
        entries = z.N * z.entries
        activations = 3.3 * z.s * z.N * z.F + entries * (ENTRY_BYTES + 16 * z.D)
        if any(z.penalty):
            activations += entries * (ENTRY_PENALTY_BYTES + 4 * z.T)
    else:
        is_fast = config.sae.architecture == "standard"
        activations = (15.0 * z.s if is_fast else 18.0 * z.s + 12) * z.N * z.F
        activations += z.penalty[0] * z.s * z.N * z.F
    if any(z.penalty):
        activations += LAPLACIAN_PASSES * z.N * z.T + POSITION_PASSES * z.T * z.F
    if config.sae.revival == "auxk":
        activations += 15 * z.s * z.N * z.F * dead_share
    activations += INPUT_PASSES * z.N * z.D
    weights = SPARSE_WEIGHT_PASSES if z.is_sparse else WEIGHT_PASSES
    return activations, float(weights * z.D * z.F)


def train_stage(config: Config, z: Sizes) -> Stage:
    """All the steps of one SAE. Products, activations and weights do not overlap."""
    activations, weights = step_bytes(config, z)
    logged, saved = z.steps / config.training.log_every, z.steps / config.training.checkpoint_every
    kernels = z.steps * (STEP_KERNELS + z.penalty[1]) / 3
    checkpoints = saved * checkpoint_bytes(config, z)
    return (
        _products("products", z.steps * step_flops(config, z), z.s, kernels=kernels),
        Work("activations", bytes=z.steps * activations, kernels=kernels),
        Work("weights", bytes=z.steps * weights, kernels=kernels),
        Work(
            "logged steps",
            float32_flops=logged * 2.0 * z.N * z.T * z.F,
            bytes=logged * LOGGED_PASSES * z.N * (z.F + z.D),
            kernels=logged * LOGGED_KERNELS,
        ),
        Work("checkpoints", disk_bytes=checkpoints, hash_bytes=checkpoints),
    )


def checkpoint_bytes(config: Config, z: Sizes) -> float:
    """One checkpoint on disk: weights, Adam's two moments, counters, random state."""
    average = 4 * z.P if config.training.ema_decay is not None else 0
    history = 0
    if config.consistency.form == "batch_history":
        history = 4 * (int(config.window) - 1) * z.F
    return 12.0 * z.P + average + history + 8 * z.F + 7_000


def member_bytes(config: Config, z: Sizes) -> float:
    """Device memory that one SAE holds all through training: its checkpoint and its gradients."""
    return checkpoint_bytes(config, z) + 4 * z.P


def step_workspace(z: Sizes) -> float:
    """Device memory on top during a step; the most is needed where metrics are logged."""
    activations = (16 + (2 if z.s == 2 else 0)) * z.N * z.F
    return activations + (15.0 + z.model_s) * z.N * z.D + 8 * z.D * z.F


# ---------------------------------------------------------------------------------- evaluation


def evaluate_stage(config: Config, facts: ModelFacts, z: Sizes, n_contexts: int) -> Stage:
    cfg, tokens = config.evaluation, n_contexts * z.T
    modelled = min(cfg.model_contexts, n_contexts) * z.T
    lags, curves = cfg.max_lag + 1, cfg.max_lag + 1 + 2 * z.T
    bands = _bands(cfg.windows, z.T)
    works = [
        Work(
            "features",
            float32_flops=4.0 * z.D * z.F * (tokens + z.F) + 2.0 * tokens * z.F * bands * z.T,
            bytes=tokens * z.F * (870 + 38.0 * lags + 30.0 * bands),
            kernels=n_contexts / ENCODE_CONTEXTS * (280 + 8 * lags),
        ),
        Work(
            "bootstrap",
            float32_flops=2.0 * G * z.F * (cfg.bootstrap * (curves + 2 * z.T) + bands * z.T**2),
            bytes=z.F
            * (
                cfg.bootstrap * (140.0 * curves + 3500 + 400 * bands)
                + G * z.T * (50 * lags + 75 + 20 * bands)
            ),
            kernels=500 + cfg.bootstrap * (70.0 + 18 * sum(w <= lags for w in cfg.windows)),
        ),
        *forward_stage(config, facts, z, modelled, None, "model"),
        Work(
            "logits",
            float32_flops=4.0 * modelled * z.D * z.F,
            bytes=93.0 * modelled * facts.d_vocab,
        ),
    ]
    if cfg.analysis:
        works.append(_analysis(config, z, tokens))
    return tuple(works)


def reference_stage(config: Config, facts: ModelFacts, z: Sizes, n_contexts: int) -> Stage:
    """The language model as it is, and with zeros in place of the hook's tensor."""
    modelled = min(config.evaluation.model_contexts, n_contexts) * z.T
    return (
        *forward_stage(config, facts, z, 2 * modelled, None, "model alone"),
        Work("logits alone", bytes=114.0 * modelled * facts.d_vocab),
    )


def _analysis(config: Config, z: Sizes, tokens: int) -> Work:
    """Rough: correlations of sparse codes on the host; of all pairs, lag by lag, in a wide SAE."""
    lags, pairs = config.evaluation.redundancy_max_lag, float(z.F) ** 2
    seconds = REPORT_SECONDS + 10e-9 * tokens * (lags + 1) * z.entries**2
    if (lags + 1) * pairs > DENSE_PAIRS:
        seconds += PAIR_SECONDS * max(pairs, min((2 * lags + 1) * pairs, SPARSE_PAIRS))
    return Work("analysis", float32_flops=2.0 * tokens * z.D * z.F, host_seconds=seconds)


def _bands(windows: Sequence[int], n_positions: int) -> int:
    """Windows whose document part can be measured: lags from 4 W fit into 3/4 of a context."""
    return sum(4 * w <= 3 * n_positions // 4 for w in windows)


def suite_bytes(z: Sizes, max_lag: int, windows: Sequence[int]) -> float:
    """The sums that the consistency suite keeps, on the device."""
    bands = _bands(windows, z.T)
    of_position = z.T * (24 + 12.0 * G)
    of_lags = 16.0 * z.T * (max_lag + 1) + 4 * G * (z.T + max_lag + 1)
    of_bands = 8 * (2 + bands) * z.T + 4 * G * (z.T + bands)
    return z.F * (of_position + of_lags + of_bands + 80 * G) + 4 * G * bands * z.T**2


def evaluate_workspace(config: Config, facts: ModelFacts, z: Sizes) -> float:
    """Device memory of the evaluation: the suite and its resamples, the logits, or the analysis."""
    cfg, batch = config.evaluation, ENCODE_CONTEXTS * z.T
    suite = 1.6 * suite_bytes(z, cfg.max_lag, cfg.windows) + 12 * batch * z.F
    logits = 3.0 * z.model_s * min(LOGITS, batch * facts.d_vocab)
    pairs = (cfg.redundancy_max_lag + 1) * z.F**2
    close = min(z.F, CLOSE_FEATURES)
    analysis = (4.0 * pairs if pairs <= DENSE_PAIRS else 0) + 20 * close**2 + 8 * batch * z.F
    return max(suite, logits, analysis if cfg.analysis else 0)


def forward_workspace(config: Config, facts: ModelFacts, z: Sizes) -> float:
    """Device memory of a harvesting pass beside the weights."""
    tokens = config.model.forward_contexts * z.T
    return tokens * (z.model_s * (6.0 * facts.d_model + 4 * facts.d_mlp) + 8 * z.T * facts.n_heads)
