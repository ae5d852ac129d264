"""Files to tensors: CPU time a file, on one thread, beside what else gives the same; and how busy a model is kept.

python -m bench.bench_files                                   pictures and short sounds, and the pipeline
python -m bench.bench_files --kinds "video 1080p" --seconds 5

A file's time is that of this process, all of its threads, for one call of a processor: a core decodes 1000 / ms files
a second. `decode_ms` is the decoder's part alone (Pillow's, of pictures). Upstream: its arithmetic in plain PyTorch,
behind the decoder that it uses or the nearest there is. Others are measured where they are installed; `differs` is how
far their result is from ours, and what differs by more than a hundredth of the range is called another result.

Pipeline: `embed_files` with a model that does nothing for a stated time, as a GPU would compute, and workers that
decode nothing: how much of the time the model is busy, and what a file costs the process that feeds it.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lbfast.checkpoints import Checkpoint, open_checkpoints
from lbfast.data.decode import Task
from lbfast.data.shared import as_array
from lbfast.embedding import embed_files
from lbfast.model.config import published_config
from lbfast.processing.media import Reading
from lbfast.processing.nvdec import available
from lbfast.processing.processor import transform_dict
from lbfast.processing.transforms import MEAN, STD

from . import corpus, harness, options

H200_IMAGES_S, H200_CLIPS_S, H200_SOUNDS_S = 4000, 356, 2000
"""What a model eats: image 64 in 16 ms, video 16 in 45 ms, audio 32 in 16 ms."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of file: its modality, what makes one, and who else gives its tensor: name -> path -> values."""

    modality: str
    make: Callable[[Path], Path]
    others: Mapping[str, Callable[[str], Any]]
    eaten: int = H200_IMAGES_S  # files a second


def processor(modality: str) -> Any:
    return transform_dict[modality](published_config(modality))


# Others


def upstream_picture(path: str) -> torch.Tensor:
    """Pillow, and torchvision's ToTensor, Resize, CenterCrop and Normalize, as they are on tensors."""
    return _normalised(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255)


def upstream_depth(path: str) -> torch.Tensor:
    """Pillow and NumPy, then the same."""
    depth = torch.from_numpy(np.array(Image.open(path)).astype(np.float32) / 1000).clamp(0.01, 10) / 10
    return _normalised(depth.expand(3, -1, -1))


def _normalised(x: torch.Tensor) -> torch.Tensor:
    height, width = x.shape[-2:]
    size = (int(224 * height / width), 224) if width <= height else (224, int(224 * width / height))
    x = F.interpolate(x[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    x = x[:, top : top + 224, left : left + 224]
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def simplejpeg_picture(path: str) -> torch.Tensor:
    """simplejpeg, and our transform."""
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(Path(path).read_bytes(), fastdct=False, fastupsample=False)
    return _image().transform(pixels)


def opencv_picture(path: str) -> torch.Tensor:
    """OpenCV's decoder, and our transform: its own resize does not smooth."""
    import cv2

    return _image().transform(cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB))


_made: dict[str, Any] = {}


def _image() -> Any:
    return _made.setdefault("image", processor("image"))


def _frames_upstream(frames: np.ndarray) -> torch.Tensor:
    """(T, H, W, 3) -> (3, T, 224, 224): pytorchvideo's ShortSideScale and torchvision's crop, on whole frames."""
    x = torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None, None]) / torch.tensor(STD)[:, None, None, None]
    height, width = x.shape[-2:]
    size = (height * 224 // width, 224) if width < height else (224, width * 224 // height)
    x = F.interpolate(x, size, mode="bilinear", align_corners=False)
    top, left = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    return x[..., top : top + 224, left : left + 224]


def decord_clip(path: str) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    at = np.linspace(0, len(reader) - 1, 8, dtype=int)
    return _frames_upstream(reader.get_batch(at).asnumpy())


def torchcodec_clip(path: str) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    at = np.linspace(0, len(decoder) - 1, 8, dtype=int)
    return _frames_upstream(decoder.get_frames_at(at.tolist()).data.numpy())


def opencv_clip(path: str) -> torch.Tensor:
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(path)
    capture.set(cv2.CAP_PROP_N_THREADS, 1)
    frames = []
    for number in np.linspace(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) - 1, 8, dtype=int):
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(number))
        frames.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    return _frames_upstream(np.stack(frames))


def kaldi_sound(path: str) -> torch.Tensor:
    """soundfile's samples of the whole file, and kaldi-native-fbank's energies of all of them, then the segments."""
    import kaldi_native_fbank as knf
    import soundfile

    samples, rate = soundfile.read(path, dtype="float32")
    samples = samples if samples.ndim == 1 else samples[:, 0]
    options = knf.FbankOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither = rate, 0
    options.frame_opts.window_type, options.mel_opts.num_bins, options.use_energy = "hanning", 112, False
    online = knf.OnlineFbank(options)
    online.accept_waveform(rate, (samples - samples.mean()).tolist())
    online.input_finished()
    mel = np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])
    length, count = 1036, len(mel) - 1036 + 1
    if count <= 1:
        mels = np.repeat(np.tile(mel, (-(-length // len(mel)), 1))[None, :length], 3, 0)
    else:
        thirds = np.array_split(np.arange(count), 3)
        mels = np.stack([mel[third[len(third) // 2] :][:length] if len(third) else mel[:length] for third in thirds])
    return (torch.from_numpy(mels).mT - -4.2677393) / (2 * 4.5689974)


PICTURES = {"upstream": upstream_picture, "simplejpeg": simplejpeg_picture, "OpenCV": opencv_picture}


def nvdec_clip(path: str) -> torch.Tensor:
    """Ours, with torchcodec's decoder on a GPU: what is left for the CPU."""
    if "gpu" not in _made:
        available("torchcodec-cuda")
        reading = Reading(decoder="torchcodec-cuda")
        _made["gpu"] = transform_dict["video"](published_config("video"), reading=reading)
    return _made["gpu"]([path])["pixel_values"][0]


CLIPS = {"decord": decord_clip, "torchcodec": torchcodec_clip, "OpenCV": opencv_clip, "lbfast, NVDEC": nvdec_clip}
SOUNDS = {"soundfile, kaldi-native-fbank": kaldi_sound}
KINDS = {
    "JPEG 500 x 375": Kind("image", lambda f: corpus.jpeg(f / "a.jpg", 375, 500), PICTURES),
    "JPEG 1920 x 1080": Kind("image", lambda f: corpus.jpeg(f / "b.jpg", 1080, 1920), PICTURES),
    "JPEG 4000 x 3000": Kind("image", lambda f: corpus.jpeg(f / "c.jpg", 3000, 4000), PICTURES),
    "thermal JPEG 640 x 512": Kind(
        "thermal", lambda f: corpus.jpeg(f / "d.jpg", 512, 640, True), {"upstream": upstream_picture}
    ),
    "depth PNG 640 x 480": Kind(
        "depth", lambda f: corpus.depth_map(f / "e.png", 480, 640), {"upstream": upstream_depth}
    ),
    "wav 10 s": Kind("audio", lambda f: corpus.wav(f / "a.wav", 10), SOUNDS, H200_SOUNDS_S),
    "mp3 10 s": Kind("audio", lambda f: corpus.encoded(f / "a.mp3", 10, "libmp3lame"), SOUNDS, H200_SOUNDS_S),
    "mp3 4 min": Kind("audio", lambda f: corpus.encoded(f / "b.mp3", 240, "libmp3lame"), SOUNDS, H200_SOUNDS_S),
    "m4a 4 min": Kind("audio", lambda f: corpus.encoded(f / "b.m4a", 240, "aac"), {}, H200_SOUNDS_S),
    "video 320 x 240, 10 s": Kind("video", lambda f: corpus.clip(f / "a.mp4", 240, 320, 10), CLIPS, H200_CLIPS_S),
    "video 720p, 10 s": Kind("video", lambda f: corpus.clip(f / "b.mp4", 720, 1280, 10), CLIPS, H200_CLIPS_S),
    "video 1080p, 30 s, a key frame a second": Kind(
        "video", lambda f: corpus.clip(f / "c.mp4", 1080, 1920, 30, gop=30), CLIPS, H200_CLIPS_S
    ),
    "video 720p, 10 min": Kind(
        "video", lambda f: corpus.long_clip(f / "d.mp4", 720, 1280, 10, 60), CLIPS, H200_CLIPS_S
    ),
}
QUICK = [name for name in KINDS if not name.startswith("video") or "320" in name]


def measure(name: str, folder: Path, record: harness.Record, seconds: float) -> None:
    """A row for lbfast and each of the others."""
    kind = KINDS[name]
    path = str(kind.make(folder))
    ours = processor(kind.modality)
    runs: dict[str, Callable[[], Any]] = {"lbfast": lambda: ours([path])["pixel_values"][0]}
    expected = runs["lbfast"]()
    differs = {"lbfast": 0.0}
    for other, run in kind.others.items():
        try:
            got = run(path)
        except (ImportError, RuntimeError) as error:  # torchcodec without its FFmpeg
            record.add([{"case": name, "dtype": "float32", "name": other, "note": f"absent: {str(error)[:80]}"}])
            continue
        differs[other] = float((got - expected).abs().max() / (expected.max() - expected.min()))
        runs[other if differs[other] <= 0.01 else f"{other} (another result)"] = lambda run=run: run(path)
        differs[f"{other} (another result)"] = differs[other]
    if kind.modality in ("image", "thermal", "depth"):
        runs["decode"] = lambda: Image.open(path).load()
    times = harness.interleaved(runs, "cpu", seconds, clock=cpu_ms)
    decode = times.pop("decode", None)
    for other, timing in times.items():
        row = {"case": name, "dtype": "float32", "name": other, **dataclasses.asdict(timing)}
        row["differs"] = float(f"{differs[other]:.1g}")
        if other == "lbfast":
            row |= {"decode_ms": decode.median_ms} if decode else {}
            row |= {"files_s_core": round(1000 / timing.median_ms, 1), "eaten_s": kind.eaten}
            row["cores"] = round(kind.eaten * timing.median_ms / 1000, 1)
            row |= {"file_mb": round(Path(path).stat().st_size / 1e6, 2), "read_mb": round(read_mb(ours, path), 2)}
        elif other.endswith("(another result)"):
            row["part"] = "another"  # not beside ours
        record.add([row])


class CountedReads(io.FileIO):
    """A file that knows how many bytes of it were read."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data

    def readall(self) -> bytes:
        data = super().readall()
        self.count += len(data)
        return data


def read_mb(ours: Any, path: str) -> float:
    with CountedReads(path) as file:
        ours([file])
        return file.count / 1e6


def cpu_ms(run: Callable[[], Any]) -> float:
    begun = time.process_time()
    run()
    return (time.process_time() - begun) * 1e3


# The pipeline


@dataclasses.dataclass(frozen=True)
class Eater:
    """A model that takes batches of `batch` for `seconds` each."""

    modality: str
    batch: int
    seconds: float
    batches: int = 60


EATERS = (Eater("image", 64, 0.016), Eater("audio", 32, 0.016), Eater("video", 16, 0.045, 30))
SHAPES = {"image": (3, 224, 224), "audio": (3, 112, 1036), "video": (3, 8, 224, 224)}


class Ready:
    """Work that is done: the same values for every file."""

    def __init__(self, vision: Any, reading: Any = None, dtype: torch.dtype = torch.float32):
        self._dtype = dtype
        self._values: dict[str, np.ndarray] = {}

    def decode(self, task: Task) -> np.ndarray:
        if task.modality not in self._values:
            self._values[task.modality] = as_array(torch.rand(SHAPES[task.modality]).to(self._dtype))
        return self._values[task.modality]


class Pretended:
    """A model that computes nothing. As a GPU it takes a batch at once and is done `seconds` after the one before."""

    _WARM = 6  # batches: the first of them come by the pipe

    def __init__(self, eater: Eater, size: int):
        self._eater, self._size = eater, size
        self._free = 0.0
        self._starts: list[float] = []
        self._cpu: list[float] = []

    def load(self, *_: Any) -> Pretended:
        """In the place of a checkpoint's."""
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        time.sleep(max(0.0, self._free - time.perf_counter()))
        start = time.perf_counter()
        self._starts.append(start)
        self._cpu.append(time.process_time())
        self._free = start + self._eater.seconds
        return torch.ones(len(pixel_values), self._size)

    def row(self) -> dict[str, float]:
        """Share of the time, and CPU ms a file of the process that feeds it, once it runs."""
        batches = len(self._starts) - 1 - self._WARM
        spent, cpu = (times[-1] - times[self._WARM] for times in (self._starts, self._cpu))
        share = batches * self._eater.seconds / spent
        return {"busy": round(share, 3), "main_ms": round(1e3 * cpu / batches / self._eater.batch, 3)}


def feed(eater: Eater, folder: Path, workers: int) -> dict[str, float]:
    """The row of a run over files that hold nothing."""
    inside, out = folder / eater.modality, folder / f"{eater.modality}.parquet"
    inside.mkdir()
    for i in range(eater.batch * eater.batches):
        (inside / f"{i:05}").write_bytes(b"nothing")
    name = f"lbfast-mini/{eater.modality}"
    model = Pretended(eater, open_checkpoints([name])[eater.modality].config.projection_dim)
    options: Any = {"batch_size": eater.batch, "workers": workers, "dtype": "bfloat16"}
    with (
        mock.patch("lbfast.embedding.embedder.Processors", Ready),
        mock.patch.object(Checkpoint, "load", model.load),
    ):
        done = embed_files(sorted(inside.iterdir()), [name], out, modality=eater.modality, **options)
    assert done.embedded == {eater.modality: eater.batch * eater.batches}, done.failures[:1]
    return model.row()


def pipeline(folder: Path, record: harness.Record, workers: int) -> None:
    for eater in EATERS:
        case = f"{eater.modality}, {eater.batch} in {1e3 * eater.seconds:.0f} ms"
        found = feed(eater, folder, workers)
        record.add([{"what": "pipeline", "case": case, "dtype": "bfloat16", "name": f"{workers} workers", **found}])


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser(__doc__)
    parser.add_argument("--kinds", nargs="*", help="of files, by a part of their names; all: every kind")
    parser.add_argument("--list", action="store_true", help="the kinds")
    parser.add_argument("--no-pipeline", action="store_true", help="files alone")
    parser.add_argument("--workers", type=int, default=2, help="of the pipeline (%(default)s)")
    parser.add_argument("--seconds", type=options.seconds, default=1.0, help="for each number (%(default)s)")
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args(argv)
    if given.list:
        print("\n".join(KINDS))
        return 0
    parts = QUICK if given.kinds is None else KINDS if given.kinds == ["all"] else given.kinds
    kinds = [name for name in KINDS if any(part in name for part in parts)]
    record = harness.Record("Files", "cpu", given.out)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lbfast-bench-") as folder:
        record.expects(len(kinds))
        for name in kinds:
            record.begins(name)
            measure(name, Path(folder), record, given.seconds)
        if not given.no_pipeline:
            pipeline(Path(folder), record, given.workers)
    show(record)
    return 0


def show(record: harness.Record) -> None:
    """For people, in the width of their terminal; all numbers are in the JSON file."""
    harness.say(harness.describe(record.header))
    times = [row for row in record.rows if "median_ms" in row]
    for case, rows in itertools.groupby(times, lambda row: row["case"]):
        told = list(rows)
        ours = next(row for row in told if row["name"] == "lbfast")
        speed = f"{ours['files_s_core']:g} files/s a core; an H200 takes those of {ours['cores']:g} cores"
        print()
        harness.say(f"{case}: {speed}", "    ")
        for row in told:
            median, low, high = (f"{row[name]:.{1 + (row[name] < 100)}f}" for name in ("median_ms", "p20_ms", "p80_ms"))
            spread = f"{median} ms ({low} to {high})"
            more = f"{row['median_ms'] / ours['median_ms']:.1f} times as long, differs by {row['differs']:g}"
            if row is ours:
                more = f"{ours['decode_ms']:.3g} of Pillow's decoder alone" if "decode_ms" in ours else ""
                more += f"{', ' if more else ''}{ours['read_mb']:g} MB read of {ours['file_mb']:g}"
            harness.say(f"  {row['name']}: {spread}, {more}", "      ")
    busy = [row for row in record.rows if "busy" in row]
    if busy:
        print("\nThe pipeline, with files that cost nothing to decode:")
    for row in busy:
        main = f"{row['main_ms']:g} ms a file of the main process"
        harness.say(f"  {row['case']}, {row['name']}: {row['busy']:.0%} of the time busy, {main}", "      ")
    absent = {row["name"]: row["note"].removeprefix("absent: ") for row in record.rows if "note" in row}
    if absent:
        print()
        harness.say(
            "Not here, so not measured: " + "; ".join(f"{name} ({why})" for name, why in absent.items()), "    "
        )


if __name__ == "__main__":
    sys.exit(main())
