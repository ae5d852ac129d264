"""Damaged media, read in a process of their own: a result, or an error of ours that names the file, within limits.

    python -m tests.fuzz.media --seconds 60 --seed 1

Small files of every kind are made on the spot, and mutated: bits, bytes, runs, cuts, repeats, pieces of other files,
extreme numbers in headers, wrong suffixes. A worker reads one after the other; it is replaced when it dies, takes too
long or holds too much memory, which are failures. So are errors that are not ours, results that are not finite,
processes started and connections made.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import random
import shutil
import struct
import sys
import tempfile
import time
import wave
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

SECONDS, MEBIBYTES = 20.0, 2048
_TICK = 0.05  # seconds between looks at a worker
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_VISION = {"image_size": 28, "num_frames": 4, "num_mel_bins": 23, "target_length": 40, "max_depth": 10}
_FORBIDDEN = (
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "socket.connect",
    "socket.getaddrinfo",
)


def samples() -> dict[str, tuple[str, bytes]]:
    """name -> (modality, content) of whole files, of all kinds that can be written here."""
    rng = np.random.default_rng(0)
    made: dict[str, tuple[str, bytes]] = {}
    picture = Image.fromarray(np.kron(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)))
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff", "avif", "jp2", "ppm", "qoi", "ico", "tga"):
        _write(made, f"image.{suffix}", "image", lambda path: picture.save(path))
    _write(made, "interlaced.tiff", "image", lambda path: picture.save(path, compression="tiff_lzw"))
    depth = Image.fromarray(rng.integers(0, 9000, (48, 64)).astype(np.uint16))
    for suffix in ("png", "tiff"):
        _write(made, f"depth.{suffix}", "depth", lambda path: depth.save(path))
    _write(made, "sound.wav", "audio", _wav)
    for suffix, codec in (
        ("flac", "flac"), ("mp3", "libmp3lame"), ("m4a", "aac"), ("ogg", "libvorbis"), ("opus", "libopus"),
        ("wma", "wmav2"), ("aiff", "pcm_s16be"), ("float.wav", "pcm_f32le"), ("ac3", "ac3"), ("mka", "flac"),
        ("caf", "pcm_s16be"),
    ):  # fmt: skip
        _write(made, f"sound.{suffix}", "audio", lambda path, codec=codec: _sound(path, codec))
    for suffix, codec, pixels in (
        ("mp4", "libx264", "yuv420p"), ("mov", "qtrle", "rgb24"), ("mkv", "libx264", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"), ("ts", "libx264", "yuv420p"), ("mpg", "mpeg2video", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("flv", "flv1", "yuv420p"), ("wmv", "wmv2", "yuv420p"), ("h264", "libx264", "yuv420p"), ("gif", "gif", "rgb8"),
        ("mjpeg.avi", "mjpeg", "yuvj420p"), ("hevc.mp4", "libx265", "yuv420p"), ("png.mov", "png", "rgb24"),
    ):  # fmt: skip
        _write(made, f"clip.{suffix}", "video", lambda path, c=codec, p=pixels: _clip(path, c, p))
    made["list.mp4"] = ("video", b"ffconcat version 1.0\nfile clip.mp4\nfile /etc/passwd\n")
    made["list.m3u8"] = ("video", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.ts\n#EXT-X-ENDLIST\n")
    made["page.png"] = ("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    return made


def _write(made: dict[str, tuple[str, bytes]], name: str, modality: str, write: Callable[[str], Any]) -> None:
    """Adds what `write(path)` writes; nothing where there is no writer for it on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        try:
            write(str(path))
            made[name] = (modality, path.read_bytes())
        except (ValueError, OSError, KeyError):
            return


def _wav(path: str) -> None:
    with wave.open(path, "wb") as file:
        file.setparams((2, 2, 16000, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).integers(-3000, 3000, 16000).astype("<i2").tobytes())


def _sound(path: str, codec: str) -> None:
    import av

    tone = (3000 * np.sin(np.arange(24000) / 9)).astype(np.int16)
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=48000, layout="mono")
        context = stream.codec_context
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate = 48000
        resampler = av.AudioResampler(context.format, "mono", 48000, frame_size=context.frame_size or 1024)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))


def _clip(path: str, codec: str, pixels: str) -> None:
    import av

    rng = np.random.default_rng(0)
    with av.open(path, "w") as out:
        options = {"x265-params": "log-level=none"} if codec == "libx265" else {"g": "4"}
        stream = out.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        for _ in range(9):
            frame = np.kron(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def mutated(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """A damaged copy: one to four changes, each of a kind drawn; half of them in the first kilobyte."""
    new = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        if not new:
            break
        at = draw.randrange(len(new) if draw.random() < 0.5 else min(len(new), 1024))
        kind = draw.randrange(9)
        if kind == 0:
            new[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            new[at] = draw.randrange(256)
        elif kind == 2:
            new[at : at + draw.randrange(1, 64)] = draw.randbytes(draw.randrange(1, 64))
        elif kind == 3:
            del new[at:]
        elif kind == 4:
            del new[at : at + draw.randrange(1, 600)]
        elif kind == 5:
            new[at:at] = new[at : at + draw.randrange(1, 600)] * draw.randrange(1, 9)
        elif kind == 6:
            other = draw.choice(others)
            begin = draw.randrange(len(other))
            new[at : at + 200] = other[begin : begin + draw.randrange(1, 400)]
        else:  # a number in a header
            order = draw.choice("<>") + draw.choice("BHI")
            value = draw.choice(_EXTREMES) if kind == 7 else draw.randrange(1 << 32)
            packed = struct.pack(order, value & ((1 << 8 * struct.calcsize(order)) - 1))
            new[at : at + len(packed)] = packed
    return bytes(new)


def _watch() -> list[str]:
    """A list to which every process that is started from here on is added, and every connection."""
    seen: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            seen.append(f"{event} {args[:1]}")

    sys.addaudithook(hook)
    return seen


def _serve(connection: Connection) -> None:
    """A worker: reads (modality, path) and answers with what came of it, until its parent hangs up."""
    import resource
    import warnings

    import torch

    from lbfast.processing.media import MediaError
    from lbfast.processing.processor import transform_dict

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    config = SimpleNamespace(vision_config=SimpleNamespace(**_VISION))
    processors = {name: make(config) for name, make in transform_dict.items()}
    for name in ("image", "audio", "video", "depth"):  # imports are no part of the measurement
        with contextlib.suppress(MediaError):
            processors[name](io.BytesIO(b"nothing"))
    seen = _watch()
    try:
        connection.send("ready")
        while True:
            modality, path = connection.recv()
            try:
                pixels = processors[modality](path)["pixel_values"]
                said = "" if bool(torch.isfinite(pixels).all()) else "pixels that are not finite"
                kind = "result"
            except MediaError as error:
                said = "" if path in str(error) else f"an error that does not name the file: {error}"
                kind = "refused"
            except Exception as error:
                said, kind = f"{type(error).__name__}: {error}", "failure"
            if seen:
                said = f"{said} {'; '.join(seen)}".strip()
                seen.clear()
            connection.send((kind, said))
    except EOFError:
        return


class _Worker:
    """A process that reads files, and what may be asked of it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.alive = self._ours.poll(180) and self._ours.recv() == "ready"

    def read(self, modality: str, path: str) -> tuple[str, str]:
        """What came of a file: (result, refused or failure, why it is one)."""
        self._ours.send((modality, path))
        waited = 0.0  # not by the clock: this process or the worker may be stopped from outside
        while waited < SECONDS:
            waited += 0 if self._stopped() else _TICK
            if self._ours.poll(_TICK):
                try:
                    kind, said = self._ours.recv()
                except EOFError:
                    break
                peak = self._peak()
                if peak > MEBIBYTES:
                    self.close()
                    return "failure", f"{peak} MiB"
                return ("failure", said) if said else (kind, "")
            if not self._process.is_alive() or self._peak() > MEBIBYTES:
                break
        peak, code = self._peak(), self._process.exitcode
        self.close()
        return "failure", f"no answer after {waited:.1f} s ({peak} MiB, exit {code})"

    def _stopped(self) -> bool:
        try:
            return Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False

    def _peak(self) -> int:
        """MiB that the process held at most."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)

    def close(self) -> None:
        """Ends it."""
        self.alive = False
        self._process.kill()
        self._process.join()
        self._ours.close()


def campaign(seconds: float, seed: int, count: int = 10**9, keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """Reads damaged files for `seconds`, or `count` of them if that is sooner. Outcomes by kind, and what failed.

    What failed is copied to `keep`, and its name is the number that draws it again.
    """
    whole = samples()
    names, contents = sorted(whole), [content for _, content in whole.values()]
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    worker = _Worker()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="lbfast-fuzz-") as folder:
        for name, (_, content) in whole.items():  # what playlists name is there
            Path(folder, name).write_bytes(content)
        number = 0
        while number < count and time.monotonic() < end:
            draw = random.Random(f"{seed} {number}")
            name = draw.choice(names)
            modality, content = whole[name]
            if draw.random() < 0.05:
                modality = draw.choice(("image", "depth", "audio", "video"))
            suffix = name.partition(".")[2] if draw.random() < 0.9 else draw.choice(names).rpartition(".")[2]
            path = Path(folder, f"damaged-{number}.{suffix}")
            path.write_bytes(mutated(content, contents, draw))
            if not worker.alive:
                worker.close()
                worker = _Worker()
            kind, said = worker.read(modality, str(path))
            outcomes[f"{modality}: {kind}"] += 1
            if kind == "failure":
                failures.append(f"media {seed}/{number} ({name} as {modality}): {said}")
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, keep / f"{seed}-{number}-{modality}.{suffix}")
            path.unlink()
            number += 1
    worker.close()
    outcomes["files"] = number
    return outcomes, failures


def run(seconds: float, seed: int, count: int = 10**9) -> list[str]:
    """What failed of so many damaged files, or of those that were read in `seconds`."""
    return campaign(seconds, seed, count)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=10**9, help="files at most")
    parser.add_argument("--keep", type=Path, help="folder for files that fail")
    given = parser.parse_args()
    counts, failed = campaign(given.seconds, given.seed, given.count, given.keep)
    print(f"seed {given.seed}:", ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    print("\n".join(failed) or "no failures")
    sys.exit(bool(failed))
