"""A synthetic world: which true features there are, how long each lasts, how they hang together.

No torch here. The record is part of a run's identity; tcsae/data/synthetic.py draws from it.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tcsae.config.strict import StrictModel

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]

CHILD, POSITION = "child", "position"
"""Names of the classes that `children` and `position` add."""
SLOW_FROM = 8.0
"""Mean tokens of a run from which a class counts as slow."""


class Lifetime(StrictModel):
    """Features of one lifetime, each on and off by itself (or by topic)."""

    n: Count
    lifetime: Annotated[float, Field(ge=1)] | Literal["document"]
    """Mean tokens of a run. 1: every token by itself; document: all of a document or nothing."""
    shape: Count = 1
    """Phases of a run, each geometric and of the same mean: 1 is the geometric law, more make runs
    of more equal length (no run is shorter than that)."""
    density: Annotated[float, Field(gt=0, lt=1)]
    """Share of the tokens on."""
    amplitude: Positive = 1.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.lifetime in ("document", 1):
            if self.shape != 1:
                raise ValueError(f"shape = {self.shape}: lifetime {self.lifetime} has no phases")
            return self
        assert not isinstance(self.lifetime, str)
        if self.shape > self.lifetime:
            raise ValueError(f"shape = {self.shape}: at most the lifetime, {self.lifetime:g}")
        if self.start_rate(self.density) > 1:
            raise ValueError(
                f"density = {self.density}: runs of {self.lifetime:g} tokens with at least one "
                f"between them are on {self.lifetime / (self.lifetime + 1):.3f} of the time at most"
            )
        return self

    @property
    def is_slow(self) -> bool:
        return self.lifetime == "document" or self.lifetime >= SLOW_FROM

    def start_rate(self, density: float) -> float:
        """Probability that a feature that is off starts at the next token."""
        assert not isinstance(self.lifetime, str)
        return density / (self.lifetime * (1 - density))


class Children(StrictModel):
    """Features that fire on single tokens, and only while their parent is on."""

    of: str
    """The class of the parents: every feature of it has children."""
    per_parent: Count
    rate: Annotated[float, Field(gt=0, lt=1)]
    """Of each child, at a token of its parent."""
    amplitude: Positive = 1.0


class PositionBound(StrictModel):
    """Features that belong to places of a context, whatever it is of: bands from both its ends."""

    n: Count
    width: Count = 2
    """Positions of a band; band 0 begins at position 1, band 1 ends at the last, and so on."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Probability of a feature at a token of its band."""
    amplitude: Positive = 1.0


class WorldConfig(StrictModel):
    """One world. Amplitudes are norms of what a feature adds; decoder rows have norm 1."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Directions, topics and every document hang on it. No seed of a run changes it."""
    d_in: Annotated[int, Field(ge=2)]
    document_tokens: Count = 127
    classes: Annotated[dict[str, Lifetime], Field(min_length=1)]
    children: Children | None = None
    position: PositionBound | None = None
    topics: Count = 1
    """A document has one of them, and every feature of `classes` its own."""
    correlation: Share = 0.0
    """c: in documents of its topic a feature is 1 + c (topics - 1) times as frequent, else 1 - c
    times."""
    amplitude_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Standard deviation of a firing's amplitude, as a share of it; none falls below a tenth."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Norm (root mean square) of the noise on a token, in every direction alike."""
    massive: Share = 0.0
    """Share of documents whose first or last token is massive."""
    massive_norm: Positive = 50.0
    """Of massive tokens and of BOS."""

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        names = sorted(self.classes)
        if taken := {CHILD, POSITION} & set(names):
            raise ValueError(f"a class cannot be called {sorted(taken)[0]}")
        if self.children is not None:
            parents = self.classes.get(self.children.of)
            if parents is None or not parents.is_slow:
                slow = [name for name in names if self.classes[name].is_slow]
                raise ValueError(
                    f"children.of = {self.children.of}: must be a slow class "
                    f"({', '.join(slow) or 'there is none'})"
                )
        most = 1 + self.correlation * (self.topics - 1)
        for name in names:
            its = self.classes[name]
            raised = its.density * most
            if raised >= 1 or its.lifetime not in ("document", 1) and its.start_rate(raised) > 1:
                raise ValueError(
                    f"classes.{name}.density = {its.density} and {most:g} times that in its topic "
                    "is more than a feature can be on: lower it, or correlation, or topics"
                )
        if self.document_tokens > 2**24:
            raise ValueError(f"document_tokens = {self.document_tokens}: at most {2**24}")
        return self

    @property
    def n_true(self) -> int:
        """Features of all classes, children and position-bound ones included."""
        own = sum(its.n for its in self.classes.values())
        if self.children is not None:
            own += self.classes[self.children.of].n * self.children.per_parent
        return own + (0 if self.position is None else self.position.n)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the features."""
        more = ((CHILD, self.children), (POSITION, self.position))
        return (*self.classes, *(name for name, part in more if part is not None))

    @property
    def slow(self) -> tuple[str, ...]:
        """Names of the classes whose runs last."""
        return tuple(name for name, its in self.classes.items() if its.is_slow)

    def check_contexts(self, context_size: int) -> None:
        """Raises ValueError for bands of positions that a context has no room for."""
        if self.position is not None:
            needed = self.position.n * self.position.width
            if needed > context_size - 1:
                raise ValueError(
                    f"model.world.position: {self.position.n} bands of {self.position.width} "
                    f"need contexts of {needed + 1} tokens (dataset.context_size = {context_size})"
                )
