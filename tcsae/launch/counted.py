"""What a job does, counted: the real classes at their real sizes, on tensors without values.

Loads torch. No line here knows an architecture: a step is `Member.train_step`, an evaluation
`on_activations` and `on_the_model`, a language model what transformers builds from its config.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from tcsae.base.progress import silenced
from tcsae.base.signals import StopRequest
from tcsae.config import Config, EvaluationConfig, parse
from tcsae.data.batches import CALIBRATION_CONTEXTS, Batch, Calibration
from tcsae.launch.counting import Counting, on_meta, size_of
from tcsae.launch.machine import Work
from tcsae.measure import evaluation
from tcsae.measure.analysis_pass import CLOSE_FEATURES, DENSE_ENTRIES
from tcsae.metrics.units import MAX_BLOCKS, Units
from tcsae.products import BY_DEVICE
from tcsae.products.cpu import CPU
from tcsae.products.plain import Chosen, Plain
from tcsae.sae.registry import sae_class
from tcsae.training.member import Member

PAIRS_AT_ONCE = 20
"""Bytes a pair of the features that the analysis looks at closely: its matrices. Measured."""

NARROW = (128, 256)
"""Features that the sums of an evaluation are counted for; the rest follows, since every sum is one
a feature."""


class Training(NamedTuple):
    """One training step of one SAE. Memory in bytes."""

    step: Work
    """While no feature can be dead."""
    dead: Work
    """More once one can be, if all features are looked at (AuxK)."""
    logged: Work
    """More where metrics are logged."""
    held: int
    """Weights, gradients, Adam's moments and the like."""
    workspace: int
    """On top, during a step."""
    checkpoint: int
    """On disk, without its header."""


class Evaluation(NamedTuple):
    """What is measured of one SAE. Memory in bytes."""

    features: Work
    """Of one context, among others."""
    draws: Work
    """All metrics again without each block of documents, whole."""
    scores: Work
    """One context spliced into the language model and scored; the model's own pass left out."""
    reference: Work
    """The same of the model alone and with zeros."""
    workspace: float


class Passes(NamedTuple):
    """A language model's forward passes."""

    forward: Work
    """Of one context, among others."""
    workspace: int
    weights: int


def training_of(config: Config, d_in: int, bfloat16: bool, on_cpu: bool) -> Training:
    """A step of this job's SAE; on a CPU it may be by the sparse route."""
    return _training(_key(config, float(config.lambda_ > 0)), d_in, bfloat16, on_cpu)


def _key(config: Config, weight: float, **plain: Any) -> str:
    """A config as something that results can be remembered by: without what changes no operation,
    and with a loss's weight that is on or off."""
    dump = config.dump()
    dump["tracking"]["group"] = None
    dump["store"]["dir"], dump["training"]["lr"] = "-", 1e-3
    dump["store"]["also"] = []
    return json.dumps(
        dump | {"name": None, "layer": None, "seed": 0, "rerun": False, "lambda": weight} | plain
    )


@functools.cache
def _training(key: str, d_in: int, bfloat16: bool, on_cpu: bool) -> Training:
    config = parse(json.loads(key))
    batch_contexts, size = config.training.batch_contexts, config.dataset.context_size
    with on_meta() as counting:
        member = Member(config, d_in, _calibration(size, d_in), "meta", bfloat16)

        def step(what: str, late: bool = False, log: bool = False) -> Work:
            batch = _batch(batch_contexts, size, d_in)
            counting.restart()
            member.step = config.steps - 1 if late else 0
            member.train_step(batch, batch.x.float(), log=log)
            return counting.work(what)

        step("the optimizer's start")
        held = counting.held
        early = step("steps")
        step("what the first late step alone does", late=True)  # p_anneal's last value of p
        late = step("dead features", late=True)
        logged = step("logged steps", late=True, log=True)
        workspace = counting.peak - held
        checkpoint = sum(size_of(x) for x in member.checkpoint({}).tensors.values())
        early_as_it_runs = early
        if on_cpu:
            with mock.patch.dict(BY_DEVICE, meta=_CPU()):
                early_as_it_runs = step("steps")
    more = late.plus(early, -1), logged.plus(late, -1)
    return Training(early_as_it_runs, *more, held, workspace, checkpoint)


class _CPU(Plain):
    """A CPU's routes, for tensors without values: as many entries are chosen as may be."""

    sparse_from_ratio = CPU.sparse_from_ratio

    def largest_of_batch(self, pre_NF: Tensor, valid_N1: Tensor, k: int) -> Chosen:
        values_M, at_M = pre_NF.flatten().topk(k * len(pre_NF))
        return values_M, at_M % pre_NF.shape[1], at_M // pre_NF.shape[1]


def _calibration(size: int, d_in: int) -> Calibration:
    return Calibration(1.0, 1.0, 0.0, torch.empty(CALIBRATION_CONTEXTS * size, d_in))


def _batch(contexts: int, size: int, d_in: int, dtype: torch.dtype = torch.float32) -> Batch:
    valid = torch.ones(contexts, size, dtype=torch.bool)
    ids = torch.zeros(contexts, size, dtype=torch.int32)
    return Batch(torch.empty(contexts, size, d_in, dtype=dtype), ids, ids, valid, valid)


# ---------------------------------------------------------------------------------- evaluation


class _Batches:
    """Stands for the held-out activations: a batch that is counted, after so many contexts."""

    device = "meta"
    contexts = evaluation.ENCODE_CONTEXTS

    def __init__(self, counting: Counting, size: int, d_in: int, before: int = 0) -> None:
        self.counting, self.size, self.d_in, self.before = counting, size, d_in, before
        self.calibration = Calibration(1.0, 1.0, 0.0, torch.empty(0, d_in))

    def __len__(self) -> int:
        return self.contexts

    @property
    def source(self) -> Any:
        """Where the documents of the contexts are known: each context from its own."""
        return SimpleNamespace(contexts=SimpleNamespace(documents=range(self.contexts)))

    def in_order(self, contexts: int, indices: Tensor | None = None) -> Iterator[Batch]:
        self.contexts = contexts
        if self.before:
            yield _batch(self.before, self.size, self.d_in)
        self.counting.most = 0
        self.counting.restart()
        yield _batch(contexts, self.size, self.d_in)


class _Model:
    """Stands for the language model: logits of the right shape, and the hook's tensor."""

    no_model: str | None = None

    def __init__(self, vocabulary: int, d_in: int, dtype: torch.dtype) -> None:
        self.vocabulary, self.d_in, self.dtype = vocabulary, d_in, dtype

    def logits(self, ids_BT: Tensor, replace: Any = None) -> Tensor:
        if replace is not None:
            replace(torch.empty(*ids_BT.shape, self.d_in, dtype=self.dtype))
        return torch.empty(*ids_BT.shape, self.vocabulary, dtype=self.dtype)

    def repeated(self, ids_BT: Tensor) -> Any:
        return contextlib.nullcontext(functools.partial(self.logits, ids_BT))


def evaluation_of(config: Config, d_in: int, vocabulary: int, bfloat16: bool) -> Evaluation:
    """What is measured of this job's SAE beside a model with so many tokens."""
    return _evaluation(_key(config, 0.0, window=2), d_in, vocabulary, bfloat16)


@functools.cache
def _evaluation(key: str, d_in: int, vocabulary: int, bfloat16: bool) -> Evaluation:
    config = parse(json.loads(key))
    size, cfg, d_sae = config.dataset.context_size, config.evaluation, config.sae.d_sae
    is_grouped = len(config.sae.group_sizes) > 1
    narrow, wider = (_sums(cfg.model_dump_json(), size, d_in, n, is_grouped) for n in NARROW)
    share = (d_sae - NARROW[0]) / (NARROW[1] - NARROW[0])
    features, draws = (
        a.plus(b.plus(a, -1), share) for a, b in zip(narrow[:2], wider[:2], strict=True)
    )
    # Each for itself: of the two the one that is larger in a narrow SAE is not so in a wide one.
    sums = max(a + share * (b - a) for a, b in zip(narrow[2:], wider[2:], strict=True))
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    with on_meta() as counting, torch.no_grad(), silenced():
        sae = sae_class(config.sae.architecture)(config.sae, d_in)
        batches: Any = _Batches(counting, size, d_in)
        for batch in batches.in_order(evaluation.ENCODE_CONTEXTS):
            sae.encode_and_decode(batch.x, segments=batch.segments, valid=batch.valid)
        encoded = counting.work("features").times(1 / batches.contexts)
        scores = []
        for saes in ([], [sae]):
            model: Any = _Model(vocabulary, d_in, dtype)
            evaluation.on_the_model(saes, config, model, batches, StopRequest())
            scores.append(counting.work("logits").times(1 / batches.contexts))
    pairs = (cfg.redundancy_max_lag + 1) * d_sae**2
    close = PAIRS_AT_ONCE * min(d_sae, CLOSE_FEATURES) ** 2
    analysis = cfg.analysis * (close + (4 * pairs if pairs <= DENSE_ENTRIES else 0))
    own, workspace = scores[1].plus(scores[0], -1), max(sums, counting.most, analysis)
    return Evaluation(features.plus(encoded), draws, own, scores[0], workspace)


@functools.cache
def _sums(
    options: str, size: int, d_in: int, d_sae: int, is_grouped: bool
) -> tuple[Work, Work, int, int]:
    """(what a context's features go through, the intervals, bytes of each) of so many features."""
    cfg = EvaluationConfig.model_validate_json(options)
    dataset = SimpleNamespace(context_size=size, norm_filter=0.0)
    config: Any = SimpleNamespace(evaluation=cfg, dataset=dataset)
    # After so many contexts, each a document, the sums have the size they keep.
    units = Units.of_contexts(MAX_BLOCKS)
    with on_meta() as counting, torch.no_grad(), silenced():
        sae: Any = _Features(d_in, [d_sae // 2] * 2 if is_grouped else [d_sae])
        batches: Any = _Batches(counting, size, d_in, MAX_BLOCKS - evaluation.ENCODE_CONTEXTS)
        _, suite, *_ = evaluation.on_activations(sae, config, batches, units, StopRequest())
        features = counting.work("features").times(1 / batches.contexts)
        in_passing, counting.most = counting.most, 0
        counting.restart()
        suite.draws()
        draws = counting.work("intervals")
    return features, draws, in_passing, counting.most


class _Features:
    """Stands for an SAE: features and reconstructions out of nothing."""

    sequential = False

    def __init__(self, d_in: int, groups: list[int]) -> None:
        self.cfg, self.d_sae, self.d_in = SimpleNamespace(group_sizes=groups), sum(groups), d_in

    def encode_and_decode(self, x: Tensor, **masks: Any) -> tuple[Tensor, Tensor]:
        return torch.empty(*x.shape[:2], self.d_sae), torch.empty_like(x)


# ------------------------------------------------------------------------------ language model


@functools.cache
def passes(shape: str, contexts: int, size: int, n_blocks: int | None, bfloat16: bool) -> Passes:
    """`contexts` of `size` tokens through the first blocks, or (None) all and to the logits.

    `shape` is the model's config as JSON (`model_facts`).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    described = json.loads(shape)
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    config.pad_token_id = None  # else a warning that the ids, which mean nothing, are padding
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    with on_meta() as counting, torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        weights = sum(size_of(p) for p in model.parameters())
        blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        if n_blocks is not None:
            del blocks[n_blocks:]
        held = counting.held
        ids = torch.zeros(contexts, size, dtype=torch.long)
        counting.restart()
        (model if n_blocks is None else model.base_model)(ids, use_cache=False)
        return Passes(counting.work("model").times(1 / contexts), counting.peak - held, weights)
