"""A model with its processor and tokenizer: samples and captions -> unit embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lbfast.checkpoints import Checkpoint, checked_dim, open_checkpoints, pick_device, pick_dtype
from lbfast.data.decode import Decoder, Undecodable
from lbfast.data.reader import Draw, Reader
from lbfast.data.sample import Sample
from lbfast.data.store import StoreError
from lbfast.embeds import media_features, text_features, unit, usable

Progress = Callable[[str, int, int], None]
"""progress(what, done, total)"""


class Encoder:
    """Embeds one modality and text.

    Args:
        model: in eval mode, on the device and in the dtype it is to run in.
        processor: of the modality.
        tokenizer: for captions.
        batch_size: samples or captions at a time.
        workers: processes that decode ahead; 0: none.
        dim: keep the first `dim` numbers of embeddings, of unit length again; None: all.
        progress: called after each batch.

    Raises ValueError where a number is wrong.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        workers: int = 0,
        dim: int | None = None,
        progress: Progress | None = None,
    ):
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size, workers: expected at least 1 and 0, got {batch_size} and {workers}")
        self.model, self.processor, self.tokenizer = model, processor, tokenizer
        self.dim = checked_dim(dim, model.config.projection_dim)
        self.batch_size, self.workers, self.progress = batch_size, workers, progress or (lambda *_: None)

    @classmethod
    def open(
        cls,
        given: str | os.PathLike[str] | Checkpoint,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 32,
        precision: str | None = None,
        **options: Any,
    ) -> Encoder:
        """The encoder of a checkpoint: "DIR_OR_NAME" or "MODALITY=DIR_OR_NAME".

        Args:
            device, dtype: as in `lbfast.embedding.embed_files`.
            precision: as in `lbfast.optimize_for_inference`.
            options: of the encoder, see above.
        """
        from lbfast.processing.processor import transform_dict

        checkpoint = given if isinstance(given, Checkpoint) else next(iter(open_checkpoints([given]).values()))
        target = pick_device(device)
        model = checkpoint.load(pick_dtype(dtype, target), target, batch_size, precision)
        processor = transform_dict[checkpoint.modality](checkpoint.config)
        return cls(model, processor, checkpoint.tokenizer(), batch_size=batch_size, **options)

    @property
    def modality(self) -> str:
        return self.processor.modality

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def media(
        self, samples: Sequence[Sample], on_skip: Callable[[str, str], None] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Unit embeddings (n, E) float32 on the CPU, and the numbers of the n samples that could be embedded."""
        kept: list[int] = []
        rows: list[torch.Tensor] = []
        weight = next(self.model.parameters())
        reader = Reader(self.processor, captions=False, dtype=weight.dtype)
        tasks = [Draw(sample.path, sample, 0) for sample in samples]
        sizes = [min(self.batch_size, len(tasks) - first) for first in range(0, len(tasks), self.batch_size)]
        ahead = 2 * self.batch_size + self.workers
        with Decoder(reader, tasks, self.workers, ahead, sizes, self.device) as decoder:
            results = iter(decoder)
            for first in range(0, len(samples), self.batch_size):
                numbers = range(first, min(first + self.batch_size, len(samples)))
                good: list[int] = []
                pixels: list[np.ndarray] = []
                for number in numbers:
                    result = next(results)
                    if not isinstance(result, Undecodable):
                        good.append(number)
                        pixels.append(result.pixels)
                    elif result.lasting:
                        raise StoreError(result.reason)
                    elif on_skip is not None:
                        on_skip(samples[number].path, result.reason)
                if good:
                    embeds = self._unit(media_features(self.model, pixels, weight.dtype, self.device))
                    finite = usable(embeds)
                    for number, fine in zip(good, finite.tolist()):
                        if fine:
                            kept.append(number)
                        elif on_skip is not None:
                            on_skip(samples[number].path, f"its embedding is not finite in {weight.dtype}")
                    rows.append(embeds[finite])
                self.progress(self.modality, numbers[-1] + 1, len(samples))
        return (torch.cat(rows) if kept else self._none()), kept

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit embeddings (n, E) float32 on the CPU. Longer texts are cut, as in training."""
        rows = [self._none()]
        for first in range(0, len(texts), self.batch_size):
            batch = texts[first : first + self.batch_size]
            rows.append(self._unit(text_features(self.model, self.tokenizer, batch)))
            self.progress("text", first + len(batch), len(texts))
        return torch.cat(rows)

    def _unit(self, embeds: torch.Tensor) -> torch.Tensor:
        return unit(embeds, self.dim).cpu()

    def _none(self) -> torch.Tensor:
        return torch.empty(0, self.dim or self.model.config.projection_dim)
