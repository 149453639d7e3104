"""A stage's part of a model, built from transformers' own blocks under the names a checkpoint uses.

Shape letters: B samples, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GPTJConfig, LlamaConfig, PreTrainedConfig

from ..protocol import architecture
from ..protocol.architecture import NAMES
from ..protocol.config import ModelConfig
from ..protocol.footprint import LOGITS_NBYTES
from .blocks import View, block, final_norm, view_of
from .head_loss import loss_in_parts
from .initial import fill
from .layout import Layout
from .lora import freeze
from .packing import IGNORED
from .weights import Beginning

CONFIGS = {"gptj": (GPTJConfig, "eager"), "llama": (LlamaConfig, "sdpa")}  # and the attention it is the same as on CPUs


def hf_config(model: ModelConfig, vocab_size: int, eos_id: int = 0) -> PreTrainedConfig:
    """The transformers configuration of this shape, as a published checkpoint carries it."""
    kind, attention = CONFIGS[model.architecture]
    described = architecture.hf_config(model, vocab_size, eos_id)
    return kind.from_dict(described, attn_implementation=attention)


class StageModule(nn.Module):
    """Layers [first, last) of a model, with the embedding before layer 0 and the head after the last layer.

    Parameter names, shapes and order are those of :func:`~potluck.protocol.architecture.tensors`, so the stages' state
    dicts together are a checkpoint. Every parameter is drawn from a seed of its own (run seed and name): any peer can
    make any layer. With a ``beginning`` it is read from the run's checkpoint.

    With ``model.train: lora`` all of these are frozen, made one by one, and lie on ``device``; those that require a
    gradient are the adapters, as :func:`~potluck.protocol.architecture.trained_tensors` has them.
    """

    recomputes = False  # whether backward makes a block's graph anew, from the block's input, one block after the other

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        first: int,
        last: int,
        seed: int,
        beginning: Beginning | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        make = functools.partial(fill, seed=seed, beginning=beginning)
        lora = model.train == "lora"
        with torch.device("meta") if lora else contextlib.nullcontext():
            self._build(model, vocab_size, first, last)
        if lora:
            freeze(self, self.model_config, make, torch.device(device))
        for name, parameter in self.trained():
            make(name, parameter)

    def _build(self, model: ModelConfig, vocab_size: int, first: int, last: int) -> None:
        config, names = hf_config(model, vocab_size), NAMES[model.architecture]
        self.model_config, self._names = model.resolved(), names
        self.is_first, self.is_last = first == 0, last == model.layers
        body = nn.ModuleDict()
        if self.is_first:
            body[names.embedding] = nn.Embedding(vocab_size, model.d_model)
        self.blocks = [block(self.model_config, config, i) for i in range(first, last)]
        body[names.layers] = nn.ModuleDict({str(i): b for i, b in zip(range(first, last), self.blocks, strict=True)})
        if self.is_last:
            body[names.norm] = final_norm(self.model_config)
        self.add_module(names.root, body)
        if self.is_last:
            self.lm_head = nn.Linear(model.d_model, vocab_size, bias=model.architecture == "gptj")

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter of what is trained, in the order of the flat vector."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Token ids [B, T] (first stage) or hidden states [B, T, D] to hidden states [B, T, D].

        ``layout``: where documents and prefixes lie; None: every sequence is one document, causal.
        The last stage's output is normalized but not yet projected, see :meth:`logits`, and of the weights' dtype; that
        of the others fp32.
        """
        hidden_BTD = self.embedded(x)
        views = _Views(functools.partial(self.view, hidden_BTD, layout))
        for each in self.blocks:
            if self.recomputes and torch.is_grad_enabled() and not (self.is_last and each is self.blocks[-1]):
                again = functools.partial(_seen, each, views)
                hidden_BTD = checkpoint(again, hidden_BTD, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden_BTD = each(hidden_BTD, views.view)
        views.forget()
        return self.normalized(hidden_BTD) if self.is_last else hidden_BTD.float()

    def embedded(self, x: Tensor) -> Tensor:
        """The first stage's ids [B, T] as hidden states [B, T, D]; hidden states in the weights' dtype."""
        if not self.is_first:
            return x.to(next(self.parameters()).dtype)
        hidden_BTD: Tensor = self.get_submodule(f"{self._names.root}.{self._names.embedding}")(x)
        return hidden_BTD

    def view(self, hidden_BTD: Tensor, layout: Layout | None = None) -> View:
        """What all blocks need of a batch, made once."""
        return view_of(self.model_config, hidden_BTD, layout)

    def normalized(self, hidden_BTD: Tensor) -> Tensor:
        """The last stage's final norm; of other stages, hidden states as they are."""
        return self.get_submodule(f"{self._names.root}.{self._names.norm}")(hidden_BTD) if self.is_last else hidden_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Last stage only: normalized hidden states to logits [B, T, V]."""
        return self.lm_head(hidden_BTD)

    def loss_sum(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy summed over the targets that are not ``IGNORED``; a scalar in fp32.

        Where all logits would be large (:data:`~potluck.protocol.footprint.LOGITS_NBYTES`), of one part of the
        positions after the other; the sums are rounded otherwise then.
        """
        if 4 * targets_BT.numel() * self.lm_head.out_features > LOGITS_NBYTES:
            return loss_in_parts(hidden_BTD, self.lm_head, targets_BT)
        logits = self.logits(hidden_BTD).float()
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


class _Views:
    """A batch's view while its forward or its backward is at work, and only then: a mask is large."""

    def __init__(self, make: Callable[[], View]) -> None:
        self._make = make
        self._made: View | None = None

    @property
    def view(self) -> View:
        if self._made is None:
            self._made = self._make()
        return self._made

    def forget(self) -> None:
        self._made = None


def _seen(block: nn.Module, views: _Views, hidden_BTD: Tensor) -> Tensor:
    out: Tensor = block(hidden_BTD, views.view)
    return out
