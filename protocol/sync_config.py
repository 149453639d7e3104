"""``run.yaml``'s section ``sync``: when a round happens and what is sent in it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from .errors import ConfigError

Count = Annotated[int, Meta(ge=1, le=10**12)]
Share = Annotated[float, Meta(gt=0, le=1)]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section: immutable, named fields only."""


Bits = Literal[1, 2, 3, 4, 6, 8, 16, 32]
Feedback = Literal["implicit", "explicit"]


class Sync(Section, frozen=True, kw_only=True):
    """When a round happens and what is sent in it: one rule, the known algorithms as settings (design, section 4)."""

    coin: Share | None = None  # probability, after a step, that a part is exchanged; or
    every: Count | None = None  # each part is exchanged every N steps
    # Parts of the weights that take turns: rounds so many times smaller, and more of them.
    fragments: Annotated[int, Meta(ge=1, le=1024)] = 1
    density: Share = 1.0  # share of positions the round's seeded mask opens
    topk: Share = 1.0  # share kept, by magnitude, of what the mask opens
    chunk: Annotated[int, Meta(ge=0, le=65536)] = 0  # top-k inside every so many values; 0: over all of them
    bits: Bits = 16
    # What was not sent: stays in the weights, or goes to a buffer beside them and the weights return to the reference.
    feedback: Feedback = "implicit"
    decay: Annotated[float, Meta(ge=0, le=1)] = 1.0  # share of it that is kept from round to round
    delay: Annotated[int, Meta(ge=0, le=10**6)] = 1  # steps from a round's capture to its application
    outer_lr: Annotated[float, Meta(gt=0, le=10)] = 1.0
    outer_momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # Nesterov's, on the mean difference

    @property
    def completes(self) -> bool:
        """Whether a run's last round sends everything: what sparse ones left in the weights would be lost to the model.

        Not so with explicit feedback: its weights return to the reference and learn anew what was not sent, so the
        buffer holds the same steps many times over.
        """
        return (self.density < 1.0 or self.topk < 1.0) and self.feedback == "implicit"

    def check(self) -> None:
        """Raises ``ConfigError`` for settings that are fine one by one but make no sense together."""
        if self.every is not None:
            gap, rest = divmod(self.every, self.fragments)
            if rest or not gap:
                raise ConfigError(
                    f"sync.every {self.every} steps cannot be shared by {self.fragments} fragments",
                    hint="Make sync.every a multiple of sync.fragments.",
                )
            if self.delay > gap:
                raise ConfigError(
                    f"sync.delay {self.delay} is more than the {gap} steps from one round to the next",
                    hint=f"Lower sync.delay to {gap} at most.",
                )
        elif self.coin is not None and self.coin * self.fragments > 1:
            raise ConfigError(
                f"sync.coin {self.coin} for each of {self.fragments} fragments is more than a round a step",
                hint="Lower sync.coin or sync.fragments.",
            )
        if self.chunk and self.topk == 1.0:
            raise ConfigError(
                "sync.chunk without sync.topk below 1: everything is sent anyway",
                hint="Set sync.chunk to 0, or sync.topk.",
            )
        if self.chunk and (self.chunk < 64 or self.topk * self.chunk < 0.5):
            raise ConfigError(
                f"sync.topk {self.topk} of a chunk of {self.chunk} is less than one value",
                hint="Use chunks of 64 or more with at least one value each: 4096 is usual.",
            )
        if self.bits == 1 and self.topk == 1.0:
            raise ConfigError(
                "sync.bits 1 without sync.topk below 1: a sign alone is for values that are not near zero",
                hint="Raise sync.bits to 2, or set sync.topk.",
            )
        exact = self.density == 1.0 and self.topk == 1.0 and self.bits == 32
        if exact and (self.feedback == "explicit" or self.decay != 1.0):
            raise ConfigError(
                "sync.feedback and sync.decay are about what is not sent, and everything is sent, in 32 bits",
                hint="Leave them out, or set density, topk or bits.",
            )


PRESETS: dict[str, Sync] = {
    "potluck": Sync(every=20, fragments=4, bits=2, delay=4),
    "gptjt": Sync(coin=1 / 50, bits=16),
    "cocktail": Sync(every=1, density=0.1, topk=0.2, bits=4),
    "diloco": Sync(every=20, bits=8, outer_lr=0.7, outer_momentum=0.9),
    "sparseloco": Sync(every=30, topk=1 / 64, chunk=4096, bits=2, feedback="explicit", decay=0.95),
    "dense": Sync(every=1, bits=32, delay=0),
}


class SyncConfig(Section, frozen=True, kw_only=True):
    """A preset, and any of its settings changed by name."""

    preset: Literal["potluck", "gptjt", "cocktail", "diloco", "sparseloco", "dense"] = "potluck"
    coin: Share | None = None
    every: Count | None = None
    fragments: Annotated[int, Meta(ge=1, le=1024)] | None = None
    density: Share | None = None
    topk: Share | None = None
    chunk: Annotated[int, Meta(ge=0, le=65536)] | None = None
    bits: Bits | None = None
    feedback: Feedback | None = None
    decay: Annotated[float, Meta(ge=0, le=1)] | None = None
    delay: Annotated[int, Meta(ge=0, le=10**6)] | None = None
    outer_lr: Annotated[float, Meta(gt=0, le=10)] | None = None
    outer_momentum: Annotated[float, Meta(ge=0, lt=1)] | None = None

    def resolved(self) -> Sync:
        """The preset with this section's changes; ``coin`` and ``every`` replace each other."""
        changes = {k: v for k, v in msgspec.structs.asdict(self).items() if k != "preset" and v is not None}
        if "coin" in changes and "every" in changes:
            raise ConfigError(
                "sync.coin and sync.every are both set", hint="Keep one: a round by chance, or every N steps."
            )
        if "coin" in changes:
            changes["every"] = None
        elif "every" in changes:
            changes["coin"] = None
        sync = msgspec.structs.replace(PRESETS[self.preset], **changes)
        sync.check()
        return sync
