"""The exact large-batch step: the gradient of one big batch, in the memory of a micro-batch.

    embed every micro-batch without gradients                  pass 1
    loss = info_nce(all the embeddings); d loss / d embeddings
    embed each micro-batch again and back-propagate its rows   pass 2

The last micro-batch of pass 1 keeps its graph and is not embedded again, so that a batch that is one micro-batch takes
one ordinary step. Pass 2 draws what pass 1 drew: the patches that a row drops depend on (seed, step, row) alone, not on
micro-batches or the number of processes; dropout of adapters on (seed, step, process, micro-batch).

Source: gradient caching, Gao et al., arXiv 2101.06983.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from lbfast import distributed, ops
from lbfast.model.languagebind import LanguageBindModel, normalised
from lbfast.training.captions import TextCache
from lbfast.training.memory import Offload
from lbfast.training.parameters import BIAS

CAPTIONS_AT_ONCE = 64
_NOISE_ROWS = 64


class Rows(Protocol):
    """This process's rows of one global batch: b >= 0 pairs.

    Attributes:
        pixel_values: (b, ...), float32 or uint8, as the vision tower takes them.
        input_ids, attention_mask: (b, L).
        groups: (b,) int64, equal where captions are; only for a step with mask_repeats.
    """

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    groups: torch.Tensor


class Towers(nn.Module):
    """Both towers in one forward, so that DistributedDataParallel and FSDP see each micro-batch as one call.

    Args:
        model: of one modality, prepared for training.
    """

    def __init__(self, model: LanguageBindModel):
        super().__init__()
        self.model = model
        trained = [p.requires_grad for module in (model.text_model, model.text_projection) for p in module.parameters()]
        self.text_trained = any(trained)

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """m rows -> unit image embeddings (m, E), those of the captions where they are trained, and the loss's numbers:
        the log-scale and, where there is one, the bias: (1,) or (2,)."""
        dropout = self.model.vision_model.patch_dropout
        dropout.noise = noise
        try:
            image = unit(self.model.get_image_features(pixels))
        finally:
            dropout.noise = None
        text = self.captions(ids, mask) if self.text_trained else None
        bias = getattr(self.model, BIAS, None)
        return image, text, torch.stack([self.model.logit_scale, *([] if bias is None else [bias])])

    def captions(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(m, L) -> unit embeddings (m, E)."""
        return unit(self.model.get_text_features(ids, mask))


@dataclass(frozen=True)
class Result:
    """Of one step.

    Attributes:
        loss: scalar of the global batch, detached, on the device.
        rows: of the global batch.
    """

    loss: torch.Tensor
    rows: int


class LargeBatchStep:
    """Adds the gradient of the loss of a whole global batch to the parameters' `.grad`.

    Args:
        towers: Towers, or DistributedDataParallel or FSDP of them. With these the gradients are already averaged or
            sharded as the engine does it, and equal those of one process with the whole batch.
        micro_batch: most rows that are back-propagated at once.
        group: of the processes that share the batch; None: this one alone.
        seed: of everything random in a step.
        autocast: dtype of the towers' arithmetic, or None.
        scaler: gradients come multiplied by its scale.
        loss: "infonce", or "sigmoid", for whose bias the model was prepared.
        dims, label_smoothing: of InfoNCE.
        mask_repeats: rows that share an id of `batch.groups` are not negatives of each other.
        offload: saved activations wait in the CPU's memory.
        cache: of caption embeddings, where the text tower is not trained.
    """

    def __init__(
        self,
        towers: nn.Module,
        micro_batch: int,
        *,
        group: Any = None,
        seed: int = 0,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        loss: str = "infonce",
        dims: Sequence[int] | None = None,
        label_smoothing: float = 0.0,
        mask_repeats: bool = False,
        offload: bool = False,
        cache: TextCache | None = None,
    ):
        if micro_batch < 1:
            raise ValueError(f"micro_batch: expected at least 1, got {micro_batch}")
        self.towers = towers
        self.inner: Towers = towers.module if isinstance(towers, nn.parallel.DistributedDataParallel) else towers  # type: ignore[assignment]
        self.micro_batch, self.group, self.seed = micro_batch, group, seed
        self.autocast, self.scaler, self.label_smoothing = autocast, scaler, label_smoothing
        self.loss, self.dims, self.mask_repeats, self.cache = loss, dims, mask_repeats, cache
        self.offload = Offload(self.inner) if offload else None
        self.device = self.inner.model.logit_scale.device

    def __call__(self, batch: Rows, step: int) -> Result:
        """One step on this process's rows; every process of the group calls it with the same `step`.

        A batch that is empty on every process gives no gradient and a loss that is not a number.

        Raises ValueError where pixels and captions are not equally many.
        """
        rows = len(batch.pixel_values)
        if not rows == len(batch.input_ids) == len(batch.attention_mask):
            raise ValueError(
                f"batch: expected as many captions as pixels, got {len(batch.input_ids)} (masks: "
                f"{len(batch.attention_mask)}) and {rows}"
            )
        total, pieces = self._plan(batch, step)
        if not total:
            return Result(torch.full((), torch.nan, device=self.device), 0)
        texts = None if self.inner.text_trained else self.embed_captions(batch.input_ids, batch.attention_mask)

        images, trained_texts = [], []
        with torch.no_grad():
            for piece in pieces[:-1]:
                image, text, _ = self._forward(self.inner, batch, piece)
                images.append(image[: piece.rows])
                trained_texts.append(None if text is None else text[: piece.rows])
        last = pieces[-1]
        kept = self._forward_with_graph(batch, last, synchronise=len(pieces) == 1)
        images.append(kept[0].detach()[: last.rows])
        trained_texts.append(None if kept[1] is None else kept[1].detach()[: last.rows])

        image_leaf = torch.cat(images).requires_grad_(kept[0].requires_grad)
        if texts is None:
            texts = torch.cat([text for text in trained_texts if text is not None]).requires_grad_()
        numbers = kept[2].detach().clone().requires_grad_(kept[2].requires_grad)
        del images, trained_texts
        loss = self._loss(image_leaf, texts, numbers, batch.groups.to(self.device) if self.mask_repeats else None)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

        ranks = distributed.world(self.group)[1]  # the engines average over them
        gradients = [None if leaf.grad is None else leaf.grad * ranks for leaf in (image_leaf, texts)]
        _backward(kept, last, gradients, numbers.grad if len(pieces) == 1 else None)
        del kept
        for piece in pieces[:-1]:
            final = piece is pieces[-2]
            outputs = self._forward_with_graph(batch, piece, synchronise=final)
            _backward(outputs, piece, gradients, numbers.grad if final else None)
            del outputs
        return Result(loss.detach(), total)

    def _loss(
        self, images: torch.Tensor, texts: torch.Tensor, numbers: torch.Tensor, ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Of this process's embeddings and Towers' numbers."""
        scale = numbers[0].exp()
        if self.loss == "sigmoid":
            return ops.sigmoid_loss(images, texts, scale, numbers[1], ids=ids, group=self.group)
        options = {"dims": self.dims, "label_smoothing": self.label_smoothing}
        return ops.info_nce(images, texts, scale, ids=ids, group=self.group, **options)  # type: ignore[arg-type]

    def embed_captions(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(b, L) -> unit embeddings (b, E) without gradients, some at a time, bitwise the same with a cache as without.

        What is in the cache is not computed, where all that is embedded together is there.
        """
        model = self.inner.model
        dtype = torch.promote_types(model.text_projection.weight.dtype, torch.float32)
        out = torch.empty(len(ids), model.config.projection_dim, dtype=dtype, device=self.device)
        pieces = -(-len(ids) // max(CAPTIONS_AT_ONCE, self.micro_batch))
        for start, end in itertools.pairwise(len(ids) * i // pieces for i in range(pieces + 1)) if pieces else ():
            part, rows = ids[start:end], torch.arange(end - start)
            if self.cache is not None:
                rows = self.cache.read(part, out[start:end])
            if not len(rows):
                continue
            with torch.no_grad(), self._arithmetic():
                found = self.inner.captions(part.to(self.device), mask[start:end].to(self.device))
            out[start:end] = found.to(out.dtype)
            if self.cache is not None:
                self.cache.write(part[rows], found[rows.to(self.device)], end - start)
        return out

    def _plan(self, batch: Rows, step: int) -> tuple[int, list[_Piece]]:
        """The rows of the global batch, and this process's micro-batches: on every process as many."""
        rows = len(batch.pixel_values)
        rank, ranks = distributed.world(self.group)
        sizes = [rows]
        if ranks > 1:
            every = [torch.empty(1, dtype=torch.int64, device=self.device) for _ in range(ranks)]
            dist.all_gather(every, torch.tensor([rows], device=self.device), group=self.group)
            sizes = torch.cat(every).tolist()
        counts = [-(-size // self.micro_batch) for size in sizes]
        first = sum(sizes[:rank])
        # what other processes need beyond ours is embedded for nothing: collectives wait for every process
        pieces = [_Piece(0, 0, first, (self.seed, step, rank, -1 - i)) for i in range(max(counts) - counts[rank])]
        edges = [rows * i // max(counts[rank], 1) for i in range(counts[rank] + 1)]
        for i, (start, end) in enumerate(itertools.pairwise(edges)):
            pieces.append(_Piece(start, end, first + start, (self.seed, step, rank, i)))
        return sum(sizes), pieces

    def _forward(self, towers: nn.Module, batch: Rows, piece: _Piece) -> tuple[Any, Any, Any]:
        """A micro-batch, or one row of zeros where it has none; random as its key says."""
        inputs = [x[piece.start : piece.end] for x in (batch.pixel_values, batch.input_ids, batch.attention_mask)]
        if not piece.rows:
            inputs = [x.new_zeros(1, *x.shape[1:]) for x in inputs[:2]] + [inputs[2].new_ones(1, *inputs[2].shape[1:])]
        pixels, ids, mask = (x.to(self.device, non_blocking=True) for x in inputs)
        with _seeded(self.device, piece.key), self._arithmetic():
            return towers(pixels, ids, mask, self._noise(piece))

    def _forward_with_graph(self, batch: Rows, piece: _Piece, synchronise: bool) -> tuple[Any, Any, Any]:
        with contextlib.ExitStack() as stack:
            if isinstance(self.towers, nn.parallel.DistributedDataParallel) and not synchronise:
                stack.enter_context(self.towers.no_sync())
            if self.offload is not None:
                stack.enter_context(self.offload())
            return self._forward(self.towers, batch, piece)

    def _arithmetic(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _noise(self, piece: _Piece) -> torch.Tensor | None:
        """What patch dropout chooses by, (m, patches): a row's depends on the seed, the step and its global number."""
        return patch_noise(self.inner.model, piece.first, max(piece.rows, 1), piece.key[:2], self.device)


@dataclass(frozen=True)
class _Piece:
    """A micro-batch: local rows start..end, of which the first is `first` in the global batch."""

    start: int
    end: int
    first: int
    key: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.end - self.start


def patch_noise(
    model: LanguageBindModel, first: int, rows: int, key: tuple[int, ...], device: torch.device
) -> torch.Tensor | None:
    """(rows, patches) for rows first.. of a global batch, drawn on the device; None without patch dropout."""
    vision = model.vision_model
    if not vision.patch_dropout.prob:
        return None
    blocks = range(first // _NOISE_ROWS, (first + rows - 1) // _NOISE_ROWS + 1)
    drawn = []
    for block in blocks:
        generator = torch.Generator(device).manual_seed(_mixed(*key, block))
        drawn.append(torch.rand(_NOISE_ROWS, vision.embeddings.num_patches, generator=generator, device=device))
    start = first - blocks[0] * _NOISE_ROWS
    return torch.cat(drawn)[start : start + rows]


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of unit length, in at least float32."""
    return normalised(x.to(torch.promote_types(x.dtype, torch.float32)))


def _backward(
    outputs: tuple[Any, Any, Any],
    piece: _Piece,
    gradients: list[torch.Tensor | None],
    of_numbers: torch.Tensor | None,
) -> None:
    """Back-propagates the piece's rows of the embeddings' gradients, and the numbers' where this is the last."""
    tensors, seeds = [], []
    for output, gradient in zip(outputs[:2], gradients):
        if output is not None and output.requires_grad:
            assert gradient is not None
            seed = torch.zeros_like(output)
            seed[: piece.rows] = gradient[piece.start : piece.end]
            tensors.append(output)
            seeds.append(seed)
    if outputs[2].requires_grad:
        tensors.append(outputs[2])
        seeds.append(torch.zeros_like(outputs[2]) if of_numbers is None else of_numbers)
    torch.autograd.backward(tensors, seeds)


def _mixed(*key: int) -> int:
    """A seed from numbers, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


@contextlib.contextmanager
def _seeded(device: torch.device, key: tuple[int, ...]) -> Iterator[None]:
    """What is drawn inside depends on the key alone; the generators outside are left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(
            _mixed(*key)
        )  # torch.manual_seed writes down the stack for each absent device
        if device.type == "cuda":
            torch.cuda.manual_seed_all(_mixed(*key))
        yield
