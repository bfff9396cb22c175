"""One SAE of a bank: its weights, optimizer, temporal loss, counters, and one training step."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tcsae.base.errors import UserError
from tcsae.config import Config, run_id
from tcsae.consistency import build_consistency
from tcsae.data.batches import Batch, Calibration
from tcsae.products import products_for
from tcsae.products.penalty import Weights
from tcsae.sae.base import SparseAutoencoder
from tcsae.sae.codes import TrainingOutput
from tcsae.sae.registry import sae_class
from tcsae.tensors.over_ranks import add_up, is_shared, n_ranks, summed
from tcsae.tensors.positions import block_means
from tcsae.training.checkpoint import Checkpoint
from tcsae.training.compiled import CompiledForward
from tcsae.training.graphed import GraphedStep
from tcsae.training.metrics import features_of, step_metrics
from tcsae.training.optimizer import (
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    ramp,
)
from tcsae.training.sparsity import REACHED, L0Controller


def generator_for(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A generator that depends on nothing but its arguments, so that it needs no saved state."""
    mixed = hash_int(f"{seed}/{purpose}/{step}")
    return torch.Generator().manual_seed(mixed)


def hash_int(text: str) -> int:
    """A stable 63-bit integer of a text (Python's own hash changes between processes)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _over_ranks(losses: dict[str, Tensor], total: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The terms and their sum as of the whole batch; those of this process alone as they are.

    Every rank has its part of each mean, and all of the temporal loss, which is made from sums that
    they took together: its gradient is by this rank's contexts.
    """
    if not is_shared():
        return losses, total
    names = [name for name in losses if name != "consistency"]
    values = summed(torch.stack([losses[name].detach() for name in names]))
    whole = {name: value for name, value in losses.items() if name == "consistency"}
    whole = dict(zip(names, values, strict=True)) | whole
    return whole, torch.stack([value.detach() for value in whole.values()]).sum()


@contextlib.contextmanager
def short_mantissas(wanted: bool) -> Iterator[None]:
    """A GPU's float32 products read 10 bits of a mantissa (tf32) here, if wanted, or all 23."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, wanted
    try:
        yield
    finally:
        matmul.allow_tf32 = before


class Now(NamedTuple):
    """The numbers of a step, on the host or as scalars on the device."""

    weight: Any
    """Of the temporal loss: lambda and its ramp."""
    lr: Any
    sparsity: Any
    progress: Any
    """The share of the run that is done, in [0, 1]."""
    step: Any

    def on(self, device: torch.device) -> Tensor:
        """[5] float32 on the device, sent without waiting."""
        values = torch.tensor(self, dtype=torch.float32)
        if device.type == "cuda":
            values = values.pin_memory()
        return values.to(device, non_blocking=True)


class Member:
    """An SAE in training. Inputs are scaled so that the median norm is sqrt(d_in).

    Args:
        config: the job this member is.
        d_in: width of the activations.
        calibration: gives the input scale and the first b_dec.
        device: where it trains.
        autocast: whether products are made in bfloat16 (master weights stay float32).
    """

    def __init__(
        self, config: Config, d_in: int, calibration: Calibration, device: str, autocast: bool
    ) -> None:
        self.config, self.device, self.autocast = config, device, autocast
        self.products = products_for(torch.device(device))
        self.scale = math.sqrt(d_in) / calibration.median_norm
        generator = generator_for(config.seed, "init")
        self.sae: SparseAutoencoder = sae_class(config.sae.architecture)(
            config.sae, d_in, generator=generator
        ).to(device)
        self.sae.initialise_from_data(calibration.sample.to(device) * self.scale)
        compiled = CompiledForward if config.training.compile else lambda forward: forward
        self.forward: Callable[..., TrainingOutput] = compiled(self.sae.training_forward)
        self.consistency = build_consistency(
            config.consistency, config.window, config.sae.group_sizes
        ).to(device)
        self.optimizer = build_optimizer(self.sae, config.training)
        is_all = type(self.sae).constrain is SparseAutoencoder.constrain
        if is_all and self.products.updates_rows(self.sae.W_dec):
            self.optimizer.decoder = self.sae.W_dec
        self.controller = None
        if config.training.target_l0 is not None and not hasattr(config.sae, "k"):
            target, lr = config.training.target_l0, config.training.lr
            self.controller = L0Controller(target, config.steps, device, lr)
        self.average = copy.deepcopy(self.sae) if config.training.ema_decay is not None else None
        self.step = 0
        self.tokens_seen = torch.zeros((), dtype=torch.long, device=device)
        self.tokens_since_fired = torch.zeros(config.sae.d_sae, dtype=torch.long, device=device)
        self.dead_J: Tensor | None = None
        self.first_bad_step: dict[str, Tensor] = {}
        self.last_loss = torch.full((), math.nan, device=device)
        self.graphed = GraphedStep(self._computed) if self._is_recordable() else None

    def _is_recordable(self) -> bool:
        """Whether nothing in a step but its data and `Now` differs from one to the next."""
        cfg = self.config
        draws = cfg.consistency.shuffle_positions or cfg.consistency.form == "batch_history"
        return (
            self.products.records
            and type(self.sae).is_recordable
            and self.controller is None
            and not (draws or cfg.training.compile)
            and cfg.sae.revival != "resample"
        )

    @property
    def tokens_a_step(self) -> int:
        """Of all ranks, valid or not."""
        return self.config.training.batch_contexts * self.config.dataset.context_size

    # ------------------------------------------------------------------ one step

    def train_step(self, batch: Batch, x_BTD: Tensor, log: bool) -> dict[str, float] | None:
        """One optimizer step on scaled activations; returns the step's metrics if `log`."""
        with short_mantissas(self.config.training.precision == "tf32"):
            return self._train_step(batch, x_BTD, log)

    def _train_step(self, batch: Batch, x_BTD: Tensor, log: bool) -> dict[str, float] | None:
        now, dead = self._now(), self._dead(batch)
        x_BTD = self._averaged(batch, x_BTD)
        tensors = (x_BTD, batch.valid, batch.segments)
        if self.graphed is None:
            output, losses = self._computed(*tensors, now, dead)
        elif is_shared():  # the sums over ranks are not of a recorded step
            output, losses = self._computed(*tensors, now.on(x_BTD.device), dead)
        elif dead is None or not len(dead):
            output, losses = self.graphed(*tensors, now.on(x_BTD.device))
        else:  # no two steps with features to revive have the same shapes
            output, losses = self._computed(*tensors, now.on(x_BTD.device), dead)
        self.step += 1
        self._resample(batch, x_BTD)
        return self._metrics(output, batch, x_BTD, losses, now) if log else None

    def _averaged(self, batch: Batch, x_BTD: Tensor) -> Tensor:
        """What is trained on, by training.average: the tokens, or the means they are part of."""
        kind, window = self.config.training.average, self.config.window
        if kind == "none":
            return x_BTD
        length = x_BTD.shape[1] if "document" in (kind, window) else int(window)
        return block_means(x_BTD, length, batch.segments, batch.valid)

    def _now(self) -> Now:
        cfg, step, steps = self.config.training, self.step, self.config.steps
        return Now(
            weight=self.config.lambda_ * ramp(step, steps, cfg.lambda_warmup),
            lr=learning_rate(step, steps, cfg),
            sparsity=self._sparsity_weight(),
            progress=step / steps,
            step=step,
        )

    def _computed(
        self,
        x_BTD: Tensor,
        valid_BT: Tensor,
        segments_BT: Tensor,
        now: Now | Tensor,
        dead: Tensor | None = None,
    ) -> tuple[TrainingOutput, dict[str, Tensor]]:
        """All that a step does on the device."""
        if isinstance(now, Tensor):
            now = Now(*now.unbind())
        # A ramp is above 0 from its first step on.
        is_temporal = self.config.lambda_ > 0 and self.config.consistency.form != "none"
        weights = self._weights(valid_BT, segments_BT) if is_temporal else None
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast):
            output = self.forward(
                x_BTD,
                valid_BT,
                sparsity_warmup=now.sparsity,
                dead_F=dead,
                progress=now.progress,
                segments_BT=segments_BT,
                generator=generator_for(self.config.seed, "pairs", self.step),
            )
        losses = dict(output.losses)
        if weights is not None:
            penalty = self.consistency(
                features_of(output), segments=segments_BT, valid=valid_BT, weights=weights()
            )
            losses["consistency"] = now.weight * penalty
        total = torch.stack(list(losses.values())).sum()
        losses, whole = _over_ranks(losses, total)
        self._watch(losses, now.step)
        self._update(total, now.lr)
        self._after_step(output, valid_BT, now.progress, is_temporal)
        self._count(output, valid_BT)
        if self.controller is not None:
            l0 = output.codes.n_active() / summed(valid_BT.sum()).clamp(min=1)
            self.controller.observe(self.step, l0)
        self.last_loss.copy_(whole.detach())
        return output, losses

    def _dead(self, batch: Batch) -> Tensor | None:
        """The dead features as the SAE takes them; None where it is known without a look at the
        device that too few tokens have come for any.

        Where such a look makes the host wait, it is taken at every so many steps: AuxK costs what
        the dead features cost, and nothing while there are none.
        """
        after, every = self.config.sae.dead_after_tokens, self.products.dead_every
        tokens = self.tokens_a_step if is_shared() else batch.valid.numel()
        if self.step * tokens < after:
            return None
        if every == 1:
            return self.tokens_since_fired >= after
        if self.dead_J is None or self.step % every == 0:
            self.dead_J = (self.tokens_since_fired >= after).nonzero()[:, 0]
        return self.dead_J

    def _sparsity_weight(self) -> float | Tensor:
        """What the sparsity term is multiplied by at this step."""
        share = self.config.training.sparsity_warmup
        if self.controller is None:
            return ramp(self.step, self.config.steps, share)
        # A penalty that still rose at the end would be a drift, followed at a distance: 10 % low.
        warmup = ramp(self.step, self.config.steps, min(share, REACHED))
        return warmup * self.controller.multiplier(self.step)

    def _weights(self, valid_BT: Tensor, segments_BT: Tensor) -> Callable[[], Weights | None]:
        """What the temporal loss takes from a batch's masks, made beside the SAE's own pass."""
        generator = None
        if self.config.consistency.shuffle_positions:
            generator = generator_for(self.config.seed, "shuffle", self.step)
        make = partial(
            self.consistency.weights, segments=segments_BT, valid=valid_BT, generator=generator
        )
        return self.products.aside(valid_BT.device, make)

    def _update(self, total: Tensor, lr: float | Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        for parameter in self.sae.parameters():
            if parameter.grad is not None:
                add_up(parameter.grad)
        if self.optimizer.decoder is None:
            self.sae.project_decoder_gradient()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.optimizer.decoder is None:
            self.sae.constrain()

    @torch.no_grad()
    def _after_step(
        self,
        output: TrainingOutput,
        valid_BT: Tensor,
        progress: float,
        is_temporal: bool,
    ) -> None:
        """What a step changes beside the weights."""
        self.sae.after_step(output.codes, progress=progress)
        if is_temporal:
            self.consistency.after_step(features_of(output), valid=valid_BT)
        decay = self.config.training.ema_decay
        if self.average is not None and decay is not None:
            for mean, now in zip(self.average.parameters(), self.sae.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
            # Thresholds estimated on the way are moving averages already.
            for kept, new in zip(self.average.buffers(), self.sae.buffers(), strict=True):
                kept.copy_(new)

    @torch.no_grad()
    def _count(self, output: TrainingOutput, valid_BT: Tensor) -> None:
        n_valid = summed(valid_BT.sum())
        self.tokens_since_fired += n_valid
        self.tokens_since_fired.masked_fill_(output.codes.fired_F(), 0)
        self.tokens_seen += n_valid

    def _resample(self, batch: Batch, x_BTD: Tensor) -> None:
        """Every `dead_after_tokens`, until the rate falls, dead features start anew."""
        if self.config.sae.revival != "resample":
            return
        every = math.ceil(self.config.sae.dead_after_tokens / batch.valid.numel())
        last = self.config.steps * (1 - self.config.training.lr_decay)
        if self.step % every or self.step > last:
            return
        dead_F = self.tokens_since_fired >= self.config.sae.dead_after_tokens
        if dead_F.any():
            generator = generator_for(self.config.seed, "resample", self.step)
            self.sae.revive(dead_F, self.optimizer, x_BTD[batch.valid], generator)
            self.tokens_since_fired.masked_fill_(dead_F, 0)

    # ------------------------------------------------------------------ what is seen of it

    @torch.no_grad()
    def _watch(self, losses: dict[str, Tensor], step: int | Tensor) -> None:
        """Remember, without a synchronisation, the first step at which a term was not finite."""
        for name, value in losses.items():
            first = self.first_bad_step.get(name)
            if first is None:
                first = torch.full((), -1, dtype=torch.long, device=value.device)
                self.first_bad_step[name] = first
            bad = (first < 0) & ~value.detach().isfinite()
            first.copy_(torch.where(bad, step, first))

    def check_finite(self, last_good: str) -> None:
        """Raises UserError that names step and term, if a loss term was NaN or infinite."""
        bad = {name: int(step) for name, step in self.first_bad_step.items() if step >= 0}
        if bad:
            step = min(bad.values())
            terms = ", ".join(name for name, at in bad.items() if at == step)
            raise UserError(
                f"the loss is not finite at step {step} (term: {terms}); the last good checkpoint "
                f"is kept: {last_good}. Lower training.lr or the weight of that term"
            )

    @torch.no_grad()
    def _metrics(
        self,
        output: TrainingOutput,
        batch: Batch,
        x_BTD: Tensor,
        losses: dict[str, Tensor],
        now: Now,
    ) -> dict[str, float]:
        shown = {f"loss/{name}": value for name, value in losses.items()}
        shown["loss/total"] = self.last_loss
        shown |= step_metrics(output, batch.valid, batch.segments, x_BTD, self.config.window)
        dead = self.tokens_since_fired >= self.config.sae.dead_after_tokens
        shown["dead_share"] = dead.float().mean()
        # Read together: every look makes the host wait for a GPU.
        numbers = torch.stack([value.float() for value in shown.values()]).tolist()
        read = dict(zip(shown, numbers, strict=True))
        return read | {"lr": now.lr, "lambda": now.weight}

    # ------------------------------------------------------------------ state

    @property
    def made_by(self) -> str:
        """What the bits of a step hang on, beside the config: another one's sums are rounded
        otherwise."""
        device = torch.device(self.device).type
        width = "bfloat16" if self.autocast else "float32"
        if self.config.training.precision == "tf32" and device == "cuda":
            width = "tf32"
        ranks = f", {n} ranks" if (n := n_ranks()) > 1 else ""
        return (
            f"{self.products.name} products in {width} on {device}{ranks}, torch "
            f"{torch.__version__}"
        )

    def checkpoint(self, facts: dict[str, Any]) -> Checkpoint:
        tensors = {f"sae.{k}": v for k, v in self.sae.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        tensors |= {f"consistency.{k}": v for k, v in self.consistency.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        if self.controller is not None:
            tensors |= {f"controller.{k}": v for k, v in self.controller.state.items()}
        tensors |= {
            "counters.tokens_since_fired": self.tokens_since_fired,
            "counters.tokens_seen": self.tokens_seen,
            "counters.last_loss": self.last_loss,
            "rng.torch": torch.get_rng_state(),
        }
        if self.dead_J is not None:
            tensors["counters.dead"] = self.dead_J
        return Checkpoint(self.step, tensors, {"run_id": run_id(self.config), **facts})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Exactly the state that `checkpoint` was made from."""

        def part(prefix: str) -> dict[str, Tensor]:
            start = f"{prefix}."
            named = checkpoint.tensors.items()
            return {k.removeprefix(start): v for k, v in named if k.startswith(start)}

        self.sae.load_state_dict(part("sae"))
        load_optimizer_tensors(self.optimizer, part("optimizer"))
        self.consistency.load_state_dict(part("consistency"))
        if self.average is not None:
            self.average.load_state_dict(part("average"))
        if self.controller is not None:
            self.controller.load(part("controller"))
        counters = part("counters")
        self.tokens_since_fired.copy_(counters["tokens_since_fired"])
        self.tokens_seen.copy_(counters["tokens_seen"])
        self.last_loss.copy_(counters["last_loss"])
        self.dead_J = None
        if "dead" in counters:
            self.dead_J = counters["dead"].to(self.device, copy=True)
        torch.set_rng_state(part("rng")["torch"].clone())
        self.step = checkpoint.step

    @property
    def optimizer_steps(self) -> int:
        """Steps the optimizer itself has counted."""
        states = self.optimizer.state_dict()["state"].values()
        return int(max((state["step"] for state in states), default=0))

    def finished_sae(self) -> SparseAutoencoder:
        """A copy that works on raw activations: averaged weights if kept, scale folded in."""
        source = self.sae if self.average is None else self.average
        sae = copy.deepcopy(source).to("cpu")
        sae.constrain()
        sae.fold_input_scale(self.scale)
        return sae
