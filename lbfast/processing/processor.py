"""`Processor`: files, data in memory and captions -> what a model takes. A modality is a row of `ROWS`."""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from lbfast import files
from lbfast.messages import shown
from lbfast.processing import audio, depth, image, video
from lbfast.processing.media import MediaError, Reading, is_readable
from lbfast.processing.segments import CUT, Cuts, Segment, sound_segments, video_segments
from lbfast.processing.threads import one_thread
from lbfast.processing.transforms import Compose
from lbfast.processing.values import plain


@dataclass(frozen=True)
class Row:
    """What tells one modality's processing from the others.

    Attributes:
        transform: (vision_config, antialias) -> transform of one item in memory.
        load: (item, transform, **options) -> pixel values of one item, a path or in memory.
        item_dims: dimensions of one item given as array or tensor; one more is a batch. 0: arrays alone are not items.
        options: names of the vision config that `load` takes as keyword arguments.
        layouts: whether `load` takes the order of an array's axes.
    """

    transform: Callable[..., Any]
    load: Callable[..., torch.Tensor]
    item_dims: int
    options: tuple[str, ...] = ()
    layouts: bool = False


_PICTURE = Row(image.image_transform, image.load_and_transform_image, 3, layouts=True)
ROWS: dict[str, Row] = {
    "image": _PICTURE,
    "thermal": _PICTURE,
    "depth": Row(depth.depth_transform, depth.load_and_transform_depth, 2),
    "audio": Row(audio.audio_transform, audio.load_and_transform_audio, 0),
    "video": Row(
        video.video_transform, video.load_and_transform_video, 4, ("video_decode_backend", "num_frames"), True
    ),
}

_CONFIG = "processor_config.json"


class Processor:
    """Processor of one modality; use a subclass. Gives the same output for the same input, unless training.

    Args:
        config: anything with a `vision_config`.
        tokenizer: for `text`; may be absent where only `images` are given.
        antialias: smooth when shrinking images, thermal pictures and depth maps; False is what torchvision 0.14.1 did.
        training: clips are mirrored with probability 1/2, segments of long sounds are drawn.
        generator: seeds those draws; None takes torch's own.
        reading: how files are read: damaged ones, URLs, and how large they may be.

    Attributes:
        transform: turns one item in memory into pixel values; for pictures `transform.transforms` is the list of steps.
        image_processor: (item, transform, **options) -> pixel values of one item.
    """

    modality: ClassVar[str]

    def __init__(
        self,
        config: Any,
        tokenizer: Any = None,
        *,
        antialias: bool = True,
        training: bool = False,
        generator: torch.Generator | None = None,
        reading: Reading | None = None,
    ):
        row = ROWS[self.modality]
        self.reading = reading or Reading()
        self.config, self.tokenizer = config, tokenizer
        self.antialias = antialias
        self.transform = row.transform(config.vision_config, antialias)
        self.image_processor = row.load
        self.training = False
        if training:
            self.train(generator=generator)

    def train(self, mode: bool = True, generator: torch.Generator | None = None) -> Processor:
        """Turns random flips and audio segments on or off; `generator` seeds them."""
        self.training = mode
        if hasattr(self.transform, "train"):
            self.transform.train(mode, generator)
        return self

    def eval(self) -> Processor:
        """Deterministic from here on."""
        return self.train(False)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        context_length: int = 77,
        return_tensors: str | None = None,
        *,
        truncation: bool = True,
        raw: bool = False,
        clip_start_sec: float | None = None,
        clip_end_sec: float | None = None,
        layout: str | None = None,
        strict: bool | None = None,
        allow_urls: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Prepares items, captions, or both.

        Args:
            images: one item or a list: paths, bytes or file objects of encoded files; data in memory as the modality's
                transform takes it (a clip: as `to_cthw`); values of Hugging Face datasets, torchcodec's and decord's
                readers and batches. An array with one dimension more than an item is a batch.
            text: a caption or a list of them.
            context_length: tokens a caption; shorter ones are padded.
            return_tensors: "np" for NumPy's arrays; else of the text, as tokenizers take it ("pt"); pixels are tensors.
            truncation: cut longer captions; False raises instead.
            raw: pixel values as uint8 0..255, resized and cropped but not normalised, each rounded to the nearest level
                (off by up to 0.5 / 255, 0.007 after normalisation; bicubic overshoot is clamped). Not for audio.
            clip_start_sec, clip_end_sec: seconds of a video's or a sound's file.
            layout: the order of an array's axes: "THWC", "TCHW" or "CTHW" of a clip, "HW", "HWC" or "CHW" of a picture;
                None takes the one that fits its shape.
            strict, allow_urls: see `Reading`; None takes the processor's.
            kwargs: further arguments for the tokenizer.

        Returns:
            Of items a BatchFeature, with pixel_values, and input_ids and attention_mask where there are captions; of
            captions alone a BatchEncoding. Both are mappings with attributes and .to(device).
            pixel_values: float32 (or uint8) (B, 3, H, W), video (B, 3, T, H, W).

        Raises:
            FileNotFoundError, MediaError, TypeError: see lbfast.processing.media; of a batch, names the item.
            ValueError: nothing to do, an empty list, no tokenizer, a caption too long with truncation=False.
        """
        if text is None and images is None:
            raise ValueError("text, images: expected at least one of them, got neither")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors: expected 'pt', 'np' or None, got {return_tensors!r}")
        encoding = None if text is None else self._tokenize(text, context_length, return_tensors, truncation, kwargs)
        if images is None:
            return encoding
        pixel_values: Any = self.pixel_values(
            images,
            raw=raw,
            clip_start_sec=clip_start_sec,
            clip_end_sec=clip_end_sec,
            layout=layout,
            strict=strict,
            allow_urls=allow_urls,
        )
        if return_tensors == "np":
            pixel_values = pixel_values.numpy()
        from transformers import BatchFeature

        return BatchFeature({**(encoding or {}), "pixel_values": pixel_values})

    def pixel_values(
        self,
        images: Any,
        *,
        raw: bool = False,
        clip_start_sec: float | None = None,
        clip_end_sec: float | None = None,
        layout: str | None = None,
        strict: bool | None = None,
        allow_urls: bool | None = None,
    ) -> torch.Tensor:
        """What the call makes of items, alone: a tensor; transformers is not imported. Raises as the call does."""
        given = {"clip_start_sec": clip_start_sec, "clip_end_sec": clip_end_sec, "layout": layout}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self._check_options(options)
        asked: dict[str, Any] = {"strict": strict, "allow_urls": allow_urls}
        asked = {name: value for name, value in asked.items() if value is not None}
        options["reading"] = replace(self.reading, **asked) if asked else self.reading
        return self._pixels(images, raw, options)

    def segments(self, item: Any, cuts: Cuts, *, strict: bool | None = None) -> Iterator[Segment]:
        """The parts of a recording of any length, each when it is decoded; see `lbfast.processing.segments`.

        Args:
            item: a video or a sound: a path, bytes or a file object.
            cuts: which parts.
            strict: see `Reading`; None takes the processor's.

        Raises:
            FileNotFoundError, MediaError: as the call; where a file is broken off, after the parts before.
            ValueError: another modality, or a processor that draws.
        """
        if self.modality not in CUT or self.training:
            got = f"{self.modality} while training" if self.training else self.modality
            raise ValueError(f"segments: expected a processor of {' or '.join(CUT)} that draws nothing, got {got}")
        reading = self.reading if strict is None else replace(self.reading, strict=strict)
        if self.modality == "audio":
            return sound_segments(item, self.transform, cuts, reading)
        num_frames = getattr(self.config.vision_config, "num_frames", 8)
        return video_segments(item, self.transform, cuts, num_frames, reading)

    def preprocess(self, images: Any, return_tensors: str | None = None, **options: Any) -> Any:
        """The call, under the name that language models which read a tower have for it."""
        return self(images, return_tensors=return_tensors, **options)

    def _check_options(self, options: dict[str, Any]) -> None:
        row = ROWS[self.modality]
        wrong = [name for name in options if not (row.layouts if name == "layout" else self.modality in CUT)]
        if wrong:
            takers = (
                ", ".join(name for name, row in ROWS.items() if row.layouts) if wrong == ["layout"] else ", ".join(CUT)
            )
            raise ValueError(f"{', '.join(wrong)}: expected for {takers} only, got {self.modality}")

    def _pixels(self, images: Any, raw: bool, options: dict[str, Any]) -> torch.Tensor:
        items = self._items(images)
        if not items:
            raise ValueError("images: expected at least one item, got an empty list")
        transform, vision = self.transform, self.config.vision_config
        if raw:
            if not isinstance(transform, Compose):
                raise ValueError(f"raw: expected a modality with pixels, got {self.modality}")
            transform = transform.raw()
        row = ROWS[self.modality]
        options = {name: getattr(vision, name) for name in row.options if hasattr(vision, name)} | options
        rows = []
        with one_thread():
            for i, item in enumerate(items):
                with _numbered(i, item, len(items)):
                    rows.append(self.image_processor(plain(item), transform, **options))
            if len(rows) == 1 and is_readable(items[0]):  # it is nobody else's
                return rows[0].contiguous()[None]
            return torch.stack(rows)

    def _items(self, images: Any) -> list[Any]:
        """The items in `images`: a list, a batched array, or one item."""
        dims = ROWS[self.modality].item_dims
        if isinstance(images, np.ndarray | torch.Tensor):
            return list(images) if dims and images.ndim == dims + 1 else [images]
        if not isinstance(images, list | tuple):
            return [images]
        if self.modality == "audio" and len(images) == 2 and isinstance(images[1], numbers.Real):
            return [tuple(images)]
        if self.modality == "video" and images and all(_is_frame(frame) for frame in images):
            return [images]
        return list(images)

    def _tokenize(
        self, text: Any, context_length: int, return_tensors: str | None, truncation: bool, kwargs: dict[str, Any]
    ) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer: expected one for text (lbfast.processing.default_tokenizer() is CLIP's), got None"
            )
        if not isinstance(text, str) and len(text) == 0:
            raise ValueError("text: expected at least one caption, got an empty list")
        options = {"max_length": context_length, "padding": "max_length", "truncation": truncation, **kwargs}
        if not truncation:
            ids = self.tokenizer(text, **{**options, "padding": False, "max_length": None})["input_ids"]
            longest = len(ids) if isinstance(text, str) else max(map(len, ids))
            if longest > context_length:
                raise ValueError(f"text: expected at most {context_length} tokens with truncation=False, got {longest}")
        return self.tokenizer(text, return_tensors=return_tensors, **options)

    def batch_decode(self, *args: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """The tokenizer's batch_decode."""
        return self.tokenizer.batch_decode(*args, skip_special_tokens=skip_special_tokens, **kwargs)

    def decode(self, *args: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """The tokenizer's decode."""
        return self.tokenizer.decode(*args, skip_special_tokens=skip_special_tokens, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False) -> list[str]:
        """Writes processor_config.json, and the tokenizer's files where there is one; `from_pretrained` reads them.

        They take the places of those that were there when all are on the disk.

        Args:
            save_directory: made if it does not exist. config.json and weights in it are left alone.
            push_to_hub: only False; huggingface_hub.upload_folder(folder_path=...) does it.

        Returns:
            The files written.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: expected False; huggingface_hub.upload_folder(folder_path=...) does it")
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"save_directory: expected a directory, got the file {folder}")
        vision = self.config.vision_config
        fields = {
            "processor_class": type(self).__name__,
            "antialias": self.antialias,
            "vision_config": vision.to_dict() if hasattr(vision, "to_dict") else dict(vars(vision)),
        }
        with files.filling(folder, _CONFIG) as staged:
            text = json.dumps(fields, indent=2, sort_keys=True, default=str) + "\n"
            (staged / _CONFIG).write_text(text, encoding="utf-8")
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(staged)
            written = sorted(path.name for path in staged.iterdir())
        return [str(folder / name) for name in written]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **kwargs: Any,
    ) -> Processor:
        """The processor of a checkpoint, its config and its tokenizer; or one that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: directory, name on the hub, or "lbfast-mini/...".
            cache_dir, revision, token: of the download.
            kwargs: antialias, training, generator; local_files_only, force_download, subfolder; use_fast,
                trust_remote_code and the like change nothing.

        Raises:
            FileNotFoundError, OSError: it is not there. CheckpointError: a broken file, named with its field.
            ValueError, TypeError: keywords that are not known.
        """
        from lbfast.model import hub
        from lbfast.model.config import config_dict
        from lbfast.processing.text import TOKENIZERS

        kwargs |= {"cache_dir": cache_dir, "revision": revision, "token": token}
        options = hub.hub_options(kwargs)
        where = hub.full_name(pretrained_model_name_or_path)
        config_class, tokenizer_class = config_dict[cls.modality], TOKENIZERS[cls.modality]
        saved = cls._saved(hub.find_some(where, (_CONFIG, "config.json"), **options))
        if saved is None:
            config: Any = config_class.from_pretrained(where, **options)
            return cls(config, tokenizer_class.from_pretrained(where, **options), **kwargs)
        try:
            tokenizer = tokenizer_class.from_pretrained(where, **options)
        except FileNotFoundError:
            tokenizer = None  # it had none
        return cls(config_class(vision_config=saved.pop("vision_config")), tokenizer, **{**saved, **kwargs})

    @classmethod
    def _saved(cls, files: Mapping[str, Path]) -> dict[str, Any] | None:
        """What processor_config.json says, where it is one of ours."""
        from lbfast.model.hub import CheckpointError, read_json
        from lbfast.model.schema import VISION, checked

        file = files.get(_CONFIG)
        fields = None if file is None else read_json(file)
        if not isinstance(fields, dict) or "vision_config" not in fields:
            return None
        name, antialias = fields.get("processor_class"), fields.get("antialias", True)
        if name != cls.__name__:
            raise CheckpointError(f"{file}: processor_class: expected {cls.__name__}, got {shown(name)}")
        if not isinstance(antialias, bool):
            raise CheckpointError(f"{file}: antialias: expected true or false, got {shown(antialias)}")
        try:
            vision = checked(fields["vision_config"], VISION, "vision_config.")
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from None
        return {"antialias": antialias, "vision_config": vision}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(transform={self.transform!r}, training={self.training})"


class LanguageBindImageProcessor(Processor):
    """Images -> (B, 3, 224, 224)."""

    modality = "image"


class LanguageBindVideoProcessor(Processor):
    """Videos -> (B, 3, T, 224, 224)."""

    modality = "video"


class LanguageBindAudioProcessor(Processor):
    """Sounds -> (B, 3, num_mel_bins, target_length)."""

    modality = "audio"


class LanguageBindDepthProcessor(Processor):
    """Depth maps in millimetres -> (B, 3, 224, 224)."""

    modality = "depth"


class LanguageBindThermalProcessor(Processor):
    """Thermal pictures, 8 bits -> (B, 3, 224, 224)."""

    modality = "thermal"


transform_dict: dict[str, type[Processor]] = {
    "image": LanguageBindImageProcessor,
    "video": LanguageBindVideoProcessor,
    "audio": LanguageBindAudioProcessor,
    "depth": LanguageBindDepthProcessor,
    "thermal": LanguageBindThermalProcessor,
}


@contextmanager
def _numbered(i: int, item: Any, count: int) -> Iterator[None]:
    """Inside the block, an error about an item of several that no path names says which one it is."""
    try:
        yield
    except MediaError as error:
        if count == 1 or isinstance(item, str | os.PathLike):
            raise
        raise MediaError(f"images[{i}]: {error.source}", error.expected, error.got) from error
    except TypeError as error:
        if count == 1:
            raise
        raise TypeError(f"images[{i}]: {str(error).removeprefix('images: ')}") from error


def _is_frame(item: Any) -> bool:
    """A picture of a clip given as a list, rather than a clip."""
    return isinstance(item, Image.Image) or (isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 3)
