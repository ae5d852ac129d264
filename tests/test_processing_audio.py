"""Sounds: against upstream's numbers, Kaldi's formula in float64, the resampler's definition, and odd files."""

import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lbfast.processing import audio
from lbfast.processing.media import MediaError
from lbfast.processing.processor import LanguageBindAudioProcessor

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
GOLDEN = Path(__file__).parent / "data" / "preprocessing.safetensors"
VISION = SimpleNamespace(
    num_mel_bins=112, target_length=1036, audio_sample_rate=16000, audio_mean=-4.2677393, audio_std=4.5689974
)
CONFIG = SimpleNamespace(vision_config=VISION)
SMALL = SimpleNamespace(vision_config=SimpleNamespace(num_mel_bins=23, target_length=40))


@pytest.fixture
def knf():
    return


@pytest.fixture
def av():
    return pytest.importorskip("av")


def sound(seconds=0.5, rate=16000, channels=1, seed=0):
    """Tones and noise: float32 (channels, samples)."""
    rng, t = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    tones = [0.3 * np.sin(2 * np.pi * (300 + 500 * c) * t + c) + 0.1 * c for c in range(channels)]
    return torch.from_numpy((np.stack(tones) + 0.05 * rng.standard_normal((channels, len(t)))).astype(np.float32))


def write_wav(path, samples, rate=16000):
    """int16 (channels, samples) as a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setparams((samples.shape[0], 2, rate, 0, "NONE", ""))
        file.writeframes(np.ascontiguousarray(samples.T).astype("<i2").tobytes())
    return path


def mel_oracle(x, bins, rate=16000):
    """Kaldi's log-mel energies in float64, written from its definition. x: (samples,) -> (frames, bins)."""
    length, shift, size = rate * 25 // 1000, rate // 100, 1 << (rate * 25 // 1000 - 1).bit_length()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))

    def mel(f):
        return 1127 * np.log1p(f / 700)

    centres = np.linspace(mel(20.0), mel(rate / 2), bins + 2)
    at = mel(np.arange(size // 2) * rate / size)
    rise = (at - centres[:-2, None]) / (centres[1:-1] - centres[:-2])[:, None]
    fall = (centres[2:, None] - at) / (centres[2:] - centres[1:-1])[:, None]
    bank = np.maximum(np.minimum(rise, fall), 0)
    rows = []
    for begin in range(0, len(x) - length + 1, shift):
        frame = x[begin : begin + length].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, size)) ** 2
        rows.append(np.log(np.maximum(bank @ power[:-1], np.finfo(np.float32).eps)))
    return np.array(rows)


def resample_oracle(x, old, new):
    """y[n] = sum_k x[k] h(n / new - k / old), h a sinc at 0.99 of the lower Nyquist rate, Hann-windowed to 6."""
    divisor = np.gcd(old, new)
    old, new = old // divisor, new // divisor
    cutoff = 0.99 * min(old, new)
    k, out = np.arange(len(x)), np.empty(-(-len(x) * new // old))
    for n in range(len(out)):
        t = (k / old - n / new) * cutoff
        near = np.abs(t) < 6
        h = np.sinc(t[near]) * np.cos(np.pi * t[near] / 12) ** 2 * cutoff / old
        out[n] = (x[near] * h).sum()
    return out


@pytest.mark.skipif(not ASSETS.is_dir(), reason="the sample assets are not here")
def test_matches_upstream(av):
    golden, processor = load_file(GOLDEN), LanguageBindAudioProcessor(CONFIG)
    waveform, rate = audio.read_audio(ASSETS / "audio.wav")
    for item, key in (
        (ASSETS / "audio.wav", "audio.16k"),
        ((waveform[:, :48000], rate), "audio.16k_short"),
        ((waveform.repeat(1, 4), rate), "audio.16k_tiled4"),
    ):
        pixels = processor(item)["pixel_values"][0]
        assert pixels.shape == (3, 112, 1036) and pixels.dtype == torch.float32
        expected = golden[key].float()
        error = (pixels[: len(expected)] - expected).abs().max()
        assert error < 1e-3, f"{key}: {error:.2e}"
        assert key == "audio.16k_tiled4" or (torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2]))


@pytest.mark.parametrize("bins", [23, 112])
def test_fbank_is_kaldis(bins):
    x = sound(0.3)[0]
    actual, expected = audio.fbank(x, 16000, bins).numpy(), mel_oracle(x.numpy(), bins)
    assert actual.shape == expected.shape == (28, bins)
    heard = expected > np.log(np.finfo(np.float32).eps) + 1  # a filter between two lines of the spectrum hears nothing
    assert np.abs(actual - expected)[heard].max() < 5e-3
    assert (actual[~heard] < -14).all()


def test_fbank_is_that_of_kaldi_native_fbank():
    knf = pytest.importorskip("kaldi_native_fbank")
    x = sound(3.0, seed=1)[0]
    options = knf.FbankOptions()
    frame, options.mel_opts.num_bins, options.use_energy, options.htk_compat = options.frame_opts, 112, False, True
    frame.samp_freq, frame.frame_length_ms, frame.frame_shift_ms = 16000, 25, 10
    frame.dither, frame.window_type = 0.0, "hanning"
    kaldi = knf.OnlineFbank(options)
    kaldi.accept_waveform(16000, x.tolist())
    kaldi.input_finished()
    expected = np.stack([kaldi.get_frame(i) for i in range(kaldi.num_frames_ready)])
    heard = expected > -14
    actual = audio.fbank(x, 16000, 112).numpy()
    assert actual.shape == expected.shape == (298, 112) and heard.mean() > 0.9
    assert np.abs(actual - expected)[heard].max() < 2e-3


def test_fbank_takes_batches_and_any_length():
    x = sound(6.0, channels=3)
    many = audio.fbank(x, 16000, 23)
    assert many.shape == (3, 598, 23)  # more than are computed at a time
    for row, one in zip(x, many):
        torch.testing.assert_close(audio.fbank(row, 16000, 23), one, rtol=0, atol=1e-4)
        torch.testing.assert_close(audio.fbank(row[160 * 300 :], 16000, 23), one[300:], rtol=0, atol=1e-4)
    assert audio.fbank(x[:, :399], 16000, 23).shape == (3, 0, 23)


@pytest.mark.parametrize(
    "old,new,samples",
    [
        (44100, 16000, 2000),
        (48000, 16000, 500),
        (8000, 16000, 300),
        (22050, 16000, 700),
        (16000, 11025, 500),
        (44101, 16000, 400),
        (16000, 16001, 60),
        (3, 2, 1),
        (2, 3, 7),
        (16000, 16000, 50),
    ],
)
def test_resample_is_its_definition(old, new, samples):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, samples)).astype(np.float32))
    before, actual = x.clone(), audio.resample(x, old, new)
    assert actual.shape == (2, -(-samples * new // old)) and actual.dtype == torch.float32
    assert torch.equal(x, before)
    for row, channel in zip(actual.numpy(), x.numpy()):
        expected = channel if old == new else resample_oracle(channel, old, new)
        assert np.abs(row - expected).max() < 2e-6


def test_resample_keeps_tones_and_removes_what_would_alias():
    t = np.arange(44100) / 44100
    low, high = (torch.from_numpy(np.sin(2 * np.pi * f * t).astype(np.float32))[None] for f in (1000, 12000))
    expected = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)
    assert np.abs(audio.resample(low, 44100, 16000)[0].numpy() - expected)[200:-200].max() < 2e-3
    assert audio.resample(high, 44100, 16000)[0, 200:-200].abs().max() < 2e-2


@pytest.mark.parametrize("frames", [39, 40, 41, 42, 43, 120])
def test_segments(frames):
    transform = audio.audio_transform(SMALL.vision_config)
    waveform = sound((160 * (frames - 1) + 400) / 16000)
    mel = transform.get_mel(waveform)
    assert len(mel) == frames
    if frames > 40:  # whose mean is not taken, as nobody reads all of a long sound: Kaldi takes each frame's
        torch.testing.assert_close(audio.fbank(waveform[0], 16000, 23), mel, rtol=0, atol=1e-4)
        mel = audio.fbank(waveform[0], 16000, 23)
    actual = transform((waveform, 16000)) * (2 * 4.5689974) - 4.2677393
    starts = (
        [0, 0, 0]
        if frames <= 40
        else [int(p[len(p) // 2]) if len(p) else 0 for p in np.array_split(range(frames - 39), 3)]
    )
    for got, start in zip(actual, starts):
        expected = torch.cat([mel, mel])[start : start + 40] if frames < 40 else mel[start : start + 40]
        torch.testing.assert_close(got.T, expected, rtol=0, atol=1e-5)


def test_short_sounds_are_repeated():
    transform = audio.audio_transform(SMALL.vision_config)
    waveform = sound(0.15)
    mel = transform.get_mel(waveform)
    repeats = torch.cat([mel] * 4)[:40]
    torch.testing.assert_close(
        transform.waveform2melspec(waveform)[1].T * 9.1379948 - 4.2677393, repeats, rtol=0, atol=1e-5
    )


def test_training_draws_one_start_from_each_third():
    processor = LanguageBindAudioProcessor(SMALL)
    item = (sound(2.0), 16000)
    plain = processor(item)["pixel_values"]
    assert torch.equal(processor(item)["pixel_values"], plain)
    mel = (processor.transform.get_mel(item[0]) + 4.2677393) / 9.1379948
    windows = mel.unfold(0, 40, 1)  # [starts, bins, 40]
    thirds = np.array_split(np.arange(len(windows)), 3)

    def draw(count):
        drawn = []
        for _ in range(count):
            pixels = processor(item)["pixel_values"][0]
            at = [int((windows - p).abs().amax((1, 2)).argmin()) for p in pixels]
            assert all(a in third for a, third in zip(at, thirds))
            drawn.append(at)
        return drawn

    processor.train(generator=torch.Generator().manual_seed(0))
    first = draw(6)
    assert len(np.unique(first, axis=0)) > 3
    processor.train(generator=torch.Generator().manual_seed(0))
    assert draw(6) == first
    assert torch.equal(processor.eval()(item)["pixel_values"], plain)


def test_forms_of_a_waveform():
    processor = LanguageBindAudioProcessor(SMALL)
    ints = (sound() * 20000).round().to(torch.int16)
    floats = ints.float() / 32768
    before = floats.clone()
    expected = processor((floats, 16000))["pixel_values"]
    for waveform in (floats[0], floats.numpy(), floats.double(), ints, ints.numpy(), ints.to(torch.int32) * 65536):
        torch.testing.assert_close(processor((waveform, 16000))["pixel_values"], expected, rtol=0, atol=1e-4)
    assert torch.equal(processor([(floats, 16000), (floats, 16000.0)])["pixel_values"], expected.repeat(2, 1, 1, 1))
    assert torch.equal(processor([floats, 16000])["pixel_values"], expected)
    assert torch.equal(processor.transform((floats, 16000))[None], expected)
    assert torch.equal(floats, before)


def test_channel_0_less_the_mean_of_all_channels():
    transform = audio.audio_transform(SMALL.vision_config)
    stereo = sound(channels=2) + 0.2
    shifted = stereo[0] - stereo.mean()
    assert torch.equal(transform.get_mel(stereo), audio.fbank(shifted, 16000, 23))


def test_files_give_what_memory_gives(tmp_path, av):
    processor = LanguageBindAudioProcessor(SMALL)
    for rate, channels in ((16000, 1), (44100, 2), (8000, 3)):
        samples = (sound(0.6, rate, channels) * 20000).round().to(torch.int16)
        path = write_wav(tmp_path / f"{rate}.wav", samples.numpy(), rate)
        waveform, read_rate = audio.read_audio(path)
        assert read_rate == rate and torch.equal(waveform, samples.float() / 32768)
        assert torch.equal(processor(path)["pixel_values"], processor((samples, rate))["pixel_values"])


@pytest.mark.parametrize(
    "codec,file,tolerance",
    [
        ("pcm_u8", "a.wav", 1 / 127),
        ("pcm_s24le", "a.wav", 2**-22),
        ("pcm_s32le", "a.wav", 1e-7),
        ("pcm_f32le", "a.wav", 0),
        ("pcm_f64le", "a.wav", 0),
        ("pcm_s16be", "a.aiff", 2**-15),
        ("flac", "a.flac", 2**-15),
    ],
)
def test_sample_formats(tmp_path, av, codec, file, tolerance):
    samples = sound(0.4, 22050, 2).numpy()
    with av.open(str(tmp_path / file), "w") as out:
        stream = out.add_stream(codec, rate=22050, layout="stereo")
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 22050, 0
        convert = av.AudioResampler(
            format=stream.format, layout="stereo", frame_size=stream.codec_context.frame_size or None
        )
        for part in [*convert.resample(frame), *convert.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode())
    waveform, rate = audio.read_audio(tmp_path / file)
    assert rate == 22050 and waveform.shape == samples.shape
    assert np.abs(waveform.numpy() - samples).max() <= tolerance


def test_broken_files(tmp_path, av):
    good = write_wav(tmp_path / "good.wav", (sound() * 9999).numpy().astype(np.int16))
    data = good.read_bytes()
    cases = {
        "empty.wav": (b"", "an empty file"),
        "half.wav": (data[: len(data) // 2], "a WAV file that is truncated"),
        "header.wav": (data[:44], "a WAV file that is truncated"),
        "text.wav": (b"hello\n" * 99, "got text"),
        "noise.wav": (np.random.default_rng(0).bytes(4000), "unrecognised data"),
    }
    for name, (content, _) in cases.items():
        (tmp_path / name).write_bytes(content)
    write_wav(tmp_path / "silent.wav", np.zeros((1, 0), np.int16))
    write_wav(tmp_path / "blip.wav", np.zeros((1, 100), np.int16))
    cases |= {"silent.wav": (b"", "a WAV file without samples")}
    processor = LanguageBindAudioProcessor(SMALL)
    for name, (_, said) in cases.items():
        with pytest.raises(MediaError, match=said) as caught:
            processor(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: expected an audio file, got ")
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        processor(tmp_path / "missing.wav")
    with pytest.raises(MediaError, match="a folder"):
        processor(tmp_path)
    with pytest.raises(MediaError, match=r"blip\.wav: expected at least 25 ms of sound, got 100 samples"):
        processor(tmp_path / "blip.wav")


def test_files_of_other_modalities(tmp_path, av):
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=24)
        stream.width, stream.height = 32, 32
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        out.mux(stream.encode())
    for name, said in (("a.jpg", "a JPEG image without sound"), ("a.mp4", "an MP4 or QuickTime file without sound")):
        with pytest.raises(MediaError, match=said):
            audio.read_audio(tmp_path / name)


@pytest.mark.parametrize(
    "item",
    [
        (torch.zeros(1, 0), 16000),
        (torch.zeros(2, 3, 4), 16000),
        (torch.full((1, 999), torch.nan), 16000),
        (torch.zeros(1, 999, dtype=torch.int64), 16000),
        (torch.zeros(1, 999), 0),
        (torch.zeros(1, 999), 16000.5),
        (torch.zeros(1, 999), None),
        (torch.zeros(1, 999), float("inf")),
        (torch.zeros(1, 399), 16000),
        (torch.zeros(16000, 2), 16000),
    ],
    ids=["empty", "3-D", "NaN", "int64", "rate 0", "half a hertz", "no rate", "infinite", "24.9 ms", "transposed"],
)
def test_wrong_waveforms(item):
    with pytest.raises(MediaError, match=r"waveform: expected .*, got "):
        LanguageBindAudioProcessor(SMALL)([item])


def test_a_waveform_without_its_rate():
    with pytest.raises(TypeError, match=r"expected a path or \(waveform, sample_rate\), got Tensor"):
        LanguageBindAudioProcessor(SMALL)(torch.zeros(1, 999))
    with pytest.raises(ValueError, match="raw: expected a modality with pixels, got audio"):
        LanguageBindAudioProcessor(SMALL)((sound(), 16000), raw=True)


def test_the_transform_reads_the_config_and_shows_it():
    transform = audio.audio_transform(SimpleNamespace(num_mel_bins=64.0, target_length=100.0, audio_sample_rate=8000))
    assert repr(transform).startswith("AudioTransform(sample_rate=8000, num_mel_bins=64, target_length=100, ")
