"""The functions of upstream's `processing_*` modules, with its arguments: transforms by config, loaders of one file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from lbfast.processing import audio, depth, image, video
from lbfast.processing.depth import DepthNorm as DepthNorm
from lbfast.processing.transforms import MEAN, STD, Compose, Step

OPENAI_DATASET_MEAN, OPENAI_DATASET_STD = MEAN, STD
DEFAULT_AUDIO_FRAME_SHIFT_MS = 10
PYTORCHVIDEO = "pytorchvideo"

load_and_transform_image = image.load_and_transform_image
load_and_transform_thermal = image.load_and_transform_image
load_and_transform_depth = depth.load_and_transform_depth
load_and_transform_audio = audio.load_and_transform_audio


def make_list_of_images(x: Any) -> list[Any]:
    """A list as it is; anything else as the one item of a list."""
    return x if isinstance(x, list) else [x]


def get_image_transform(config: Any) -> Compose:
    """Picture in memory -> (3, size, size) float32, by `config.vision_config`."""
    return image.image_transform(config.vision_config)


def get_thermal_transform(config: Any) -> Compose:
    """The image's."""
    return image.image_transform(config.vision_config)


def get_depth_transform(config: Any) -> Compose:
    """(H, W) millimetres in memory -> (3, size, size) float32."""
    return depth.depth_transform(config.vision_config)


def get_audio_transform(config: Any) -> audio.AudioTransform:
    """(waveform, sample rate) -> (3, num_mel_bins, target_length) float32."""
    return audio.audio_transform(config.vision_config)


def get_video_transform(config: Any) -> Compose | ApplyTransformToKey:
    """Clip (3, T, H, W), 0..255 -> (3, T, size, size) float32.

    With `video_decode_backend` "pytorchvideo" it takes and gives a dict, as that library's clips are: {"video": clip},
    and chooses `num_frames` frames of it, evenly; None: all.
    """
    vision = config.vision_config
    backend = getattr(vision, "video_decode_backend", "decord")
    video.check_backend(backend)
    transform = video.video_transform(vision)
    if backend != PYTORCHVIDEO:
        return transform
    return ApplyTransformToKey("video", Compose([UniformTemporalSubsample(vision.num_frames), *transform.transforms]))


def load_and_transform_video(
    video_path: Any,
    transform: Callable[[Any], Any],
    video_decode_backend: str = "opencv",
    clip_start_sec: float = 0.0,
    clip_end_sec: float | None = None,
    num_frames: int | None = 8,
) -> Any:
    """A file through `transform`.

    Args:
        video_path: file; or frames in memory, for a backend but "pytorchvideo".
        transform: of (3, T, H, W) uint8; with "pytorchvideo" of {"video": (3, T, H, W) float32 0..255, "audio": None}.
        video_decode_backend: "opencv", "decord" or "pytorchvideo": one decoder serves all; the form differs.
        clip_start_sec, clip_end_sec: seconds of the file.
        num_frames: evenly spaced, T of them; None: every frame. "pytorchvideo" leaves it to its transform: T is all.

    Returns:
        What `transform` gives.
    """
    video.check_backend(video_decode_backend)
    if video_decode_backend != PYTORCHVIDEO:
        return video.load_and_transform_video(
            video_path, transform, video_decode_backend, clip_start_sec, clip_end_sec, num_frames
        )
    frames = video.read_frames(video_path, None, clip_start_sec, clip_end_sec)
    return transform({"video": frames.permute(3, 0, 1, 2).float(), "audio": None})


class UniformTemporalSubsample(Step):
    """`num_samples` frames of (C, T, H, W), evenly spaced, as pytorchvideo's; None: all."""

    def __init__(self, num_samples: int | None):
        self.num_samples = num_samples

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.num_samples is None:
            return x
        last = x.shape[1] - 1
        return x[:, torch.linspace(0, last, self.num_samples).clamp(0, last).long()]


class ApplyTransformToKey(Step):
    """A dict with one of its values transformed; the dict given is left as it was."""

    def __init__(self, key: str, transform: Callable[[Any], Any]):
        self.key, self.transform = key, transform

    def __call__(self, x: Mapping[str, Any]) -> Any:
        return {**x, self.key: self.transform(x[self.key])}


class AudioTransform(audio.AudioTransform):
    """`audio.AudioTransform` by a vision config with audio_sample_rate, num_mel_bins, target_length, mean and std."""

    def __init__(self, args: Any):
        rate = int(args.audio_sample_rate)
        super().__init__(rate, int(args.num_mel_bins), int(args.target_length), args.audio_mean, args.audio_std)


def torchaudio_loader(path: Any) -> tuple[torch.Tensor, int]:
    """(channels, samples) float32 in [-1, 1], and the sample rate in Hz."""
    return audio.read_audio(path)


def int16_to_float32_torch(x: torch.Tensor) -> torch.Tensor:
    """x / 32767 in float32."""
    return (x / 32767.0).float()


def float32_to_int16_torch(x: torch.Tensor) -> torch.Tensor:
    """32767 x, x clamped to [-1, 1], cut to int16."""
    return (x.clamp(-1.0, 1.0) * 32767.0).to(torch.int16)


def opencv_loader(path: Any) -> np.ndarray:
    """A picture's own values as float32, (H, W) or (H, W, C) with blue first: a depth map in its file's unit."""
    picture = image.open_image(path)
    values = np.asarray(picture.convert("RGB") if picture.mode == "P" else picture).astype(np.float32)
    if values.ndim == 2:
        return values
    return np.concatenate([values[..., 2::-1], values[..., 3:]], axis=-1)
