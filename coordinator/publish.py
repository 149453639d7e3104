"""A published model: the stages' tensors as shards of one checkpoint folder that stock transformers loads.

No tensor is read here: a stage's upload is already a safetensors file under the checkpoint's names, so publishing
is an index, a configuration and the tokenizer beside them.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from ..protocol import architecture
from ..protocol.config import RunConfig
from ..protocol.errors import StateError, WireError
from ..protocol.failpoints import failpoint
from ..protocol.manifest import Manifest
from ..protocol.weights import ITEMSIZE, StoredDtype, Weights
from .adapters import FOLDER, part_from, write_adapters
from .card import Facts, model_card
from .headers import HEADER_LIMIT, read_header

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as a config.json has them
FULL = (errno.ENOSPC, errno.EDQUOT)


class Publisher:
    """Collects the stages of a round and makes the folder when all are there."""

    def __init__(
        self,
        folder: Path,
        corpus: Path,
        config: RunConfig,
        manifest: Manifest,
        done: Callable[[int, Path], Awaitable[None]],
        *,
        card: Callable[[], Awaitable[Facts]] | None = None,
        base: Weights | None = None,
    ) -> None:
        """``card``: what the model card says of the run, asked for at each publishing. ``base``: the checkpoint that
        the run begins from; where adapters are trained, what is published has its dtypes."""
        self.folder, self.corpus, self.config, self.manifest = folder, corpus, config, manifest
        self._done, self._facts = done, card
        self._base = base.source if base else config.model.init
        self._lora = config.model.train == "lora"
        self._dtypes: dict[str, StoredDtype] = {t.name: t.dtype for t in base.tensors} if base and self._lora else {}
        self.layers: tuple[tuple[int, int], ...] = ()  # of the stages that are being collected
        self._arrived: set[int] = set()
        self._current = (-1, -1)  # step and generation of the uploads being collected
        self.trouble: tuple[int, str] | None = None  # the step that could not be written, and why

    def stage_nbytes(self, stage: int) -> int:
        """Most bytes that a stage's file may have: its tensors and a header."""
        return sum(ITEMSIZE[dtype] * math.prod(shape) for dtype, shape in self._tensors(stage).values()) + HEADER_LIMIT

    def _tensors(self, stage: int) -> dict[str, tuple[StoredDtype, tuple[int, ...]]]:
        """Dtype and shape of all that a stage uploads: its part of the model, and its adapters in fp32."""
        shapes = architecture.tensors(self.config.model, self.manifest.vocab_size, *self.layers[stage])
        return {
            name: (self._dtypes.get(name, "F32"), shape) for name, shape in (shapes | self._adapters(stage)).items()
        }

    def _adapters(self, stage: int) -> architecture.Shapes:
        if not self._lora:
            return {}
        return architecture.trained_tensors(self.config.model, self.manifest.vocab_size, *self.layers[stage])

    def begin(self, step: int, generation: int, layers: tuple[tuple[int, int], ...]) -> None:
        """Uploads of ``step`` from the stages of this generation come in; what others left unfinished is gone."""
        if self._current != (step, generation):
            self.drop()
            self._current, self.layers = (step, generation), layers

    async def resume(self, step: int, generation: int, layers: tuple[tuple[int, int], ...]) -> None:
        """Goes on where a coordinator that was killed stood: what has arrived is not sent again."""
        self._current, self.layers = (step, generation), layers
        self._arrived = {i for i in range(len(self.layers)) if (self._work(step) / self.file(i)).exists()}
        await self._finish(step)

    def drop(self) -> None:
        """Gives up what is being collected, and its space."""
        self._current, self._arrived = (-1, -1), set()
        if self.folder.exists():
            for unfinished in self.folder.glob(".step-*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def part(self, step: int, stage: int) -> Path:
        """Where a stage's upload is written while it comes in."""
        folder = self._work(step)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.file(stage)}.part"

    def file(self, stage: int) -> str:
        return f"model-{stage + 1:05d}-of-{len(self.layers):05d}.safetensors"

    def _adapter_file(self, step: int, stage: int) -> Path:
        return self._work(step) / f".adapters-{stage}"

    def path(self, step: int) -> Path:
        """The folder of a published step."""
        return self.folder / f"step-{step:08d}"

    def _work(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}"

    async def arrived(self, step: int, stage: int) -> None:
        """A stage is complete on disk; with the last one the model is published."""
        part = self.part(step, stage)
        self._check(part, stage)
        if adapters := self._adapters(stage):
            try:
                await asyncio.to_thread(part_from, part, adapters, self._adapter_file(step, stage))
            except OSError as error:
                raise unwritten(error) from None
        part.replace(part.with_suffix(""))
        self._arrived.add(stage)
        await self._finish(step)

    async def _finish(self, step: int) -> None:
        if len(self._arrived) == len(self.layers):
            try:
                facts = await self._facts() if self._facts else Facts()
                target = await asyncio.to_thread(self._assemble, step, facts)
            except OSError as error:
                raise unwritten(error) from None
            self._arrived, self.trouble = set(), None
            await self._done(step, target)

    def _check(self, part: Path, stage: int) -> None:
        """The file holds the stage's tensors by name, dtype and shape, one after the other, adapters last, and nothing
        else."""
        (header, rest), wanted = read_header(part), self._tensors(stage)
        if header.keys() != wanted.keys():
            raise WireError("an upload with other tensors than the stage's")
        end, adapters, behind = 0, self._adapters(stage), False
        try:
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                start, stop = entry["data_offsets"]
                shape, (dtype, expected) = entry["shape"], wanted[name]
                if entry["dtype"] != dtype or tuple(shape) != expected:
                    raise ValueError
                if start != end or stop - start != ITEMSIZE[dtype] * math.prod(shape):
                    raise ValueError
                if not all(type(number) is int for number in (start, stop, *shape)):
                    raise ValueError
                if behind and name not in adapters:
                    raise ValueError
                end, behind = stop, name in adapters
        except (TypeError, KeyError, ValueError):
            raise WireError("an upload whose tensors are not the stage's in plain numbers") from None
        if end != rest:
            raise WireError("an upload that is longer or shorter than its tensors")

    def _assemble(self, step: int, facts: Facts) -> Path:
        work, target = self._work(step), self.path(step)
        index: dict[str, str] = {}
        total = 0
        for stage in range(len(self.layers)):
            header, nbytes = read_header(work / self.file(stage))
            index |= dict.fromkeys(header, self.file(stage))
            total += nbytes
        write_json(work / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
        model, manifest = self.config.model, self.manifest
        described = architecture.hf_config(model, manifest.vocab_size, manifest.eos_id, prefix_lm=manifest.masked)
        if self._dtypes:  # of most of the tensors
            described["dtype"] = DTYPES[Counter(self._dtypes.values()).most_common(1)[0][0]]
        if self._lora:
            parts = [self._adapter_file(step, stage) for stage in range(len(self.layers))]
            shutil.rmtree(work / FOLDER, ignore_errors=True)  # of an assembly that was cut short
            write_adapters(work / FOLDER, parts, model, self._base)
        if manifest.special.modes:
            described["potluck_special"] = msgspec.to_builtins(manifest.special)
        write_json(work / "config.json", described)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(work / "generation_config.json", dict.fromkeys(ids, manifest.eos_id))
        card = model_card(self.config, manifest, facts)
        (work / "README.md").write_text(card, encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(self.corpus / name, work / name)
        if target.exists():
            shutil.rmtree(target)
        failpoint("coordinator.publish.rename")
        os.replace(work, target)
        for adapters in target.glob(".adapters-*"):
            adapters.unlink()
        return target


def unwritten(error: OSError) -> StateError:
    """For everybody to read: without the operator's paths."""
    why = (
        "the coordinator's disk is full" if error.errno in FULL else f"the coordinator cannot write ({error.strerror})"
    )
    return StateError(why, hint="Its operator must free some space or mend the folder's rights.", code="disk")


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
