"""Where documents and their prefixes lie in packed sequences, and which position may look at which.

This, not the mask made of it, goes from stage to stage. Shapes: B sequences, T positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """``segments``: int16 [B, T], the number of each position's document in its sequence, from 1, never falling; 0 is
    padding, which comes last. ``is_prefix``: bool [B, T], positions that their whole document may look at."""

    segments: Tensor
    is_prefix: Tensor

    def to(self, device: torch.device) -> Layout:
        return Layout(self.segments.to(device), self.is_prefix.to(device))

    def mask(self) -> Tensor:
        """Bool [B, 1, T, T]: whether position q (third axis) may look at position k (fourth).

        Inside a document: everything before, and the whole prefix. Every position sees itself, padding included.
        """
        length = self.segments.shape[1]
        before = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        same = self.segments[:, :, None] == self.segments[:, None, :]
        return (same & (before | self.is_prefix[:, None, :]))[:, None]

    def positions(self) -> Tensor:
        """Int64 [B, T]: places inside each document, from 0."""
        length = self.segments.shape[1]
        places = torch.arange(length, device=self.segments.device).expand(self.segments.shape)
        begins = torch.ones_like(self.segments, dtype=torch.bool)
        begins[:, 1:] = self.segments[:, 1:] != self.segments[:, :-1]
        return places - torch.where(begins, places, 0).cummax(1).values


class Batch(NamedTuple):
    """A microbatch on its way: ``x`` are token ids [B, T] before the first stage, hidden states [B, T, D] behind it.

    ``targets``: int64 [B, T], ``IGNORED`` where no loss is taken; ``targets[t]`` is what position t should say.
    ``layout`` None: every sequence is one document, causal.
    """

    x: Tensor
    targets: Tensor
    layout: Layout | None = None

    def to(self, device: torch.device) -> Batch:
        layout = None if self.layout is None else self.layout.to(device)
        return Batch(self.x.to(device), self.targets.to(device), layout)
