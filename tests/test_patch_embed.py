"""ops.patch_embed against its oracle: images, clips and tubes, floats and bytes, kept patches, every gradient."""

import sys

import pytest
import torch
import torch.nn.functional as F

import lbfast
from lbfast import ops
from lbfast.reference.patch_embed import patch_embed as reference
from lbfast.testing import assert_matches, assert_within_budget, randn

pytestmark = pytest.mark.any_device
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", "triton"] if DEVICE == "cuda" else ["torch", "native", "triton"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EVERY = [(impl, dtype) for impl in IMPLS for dtype in DTYPES if (impl, dtype) != ("native", torch.float16)]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def inputs(batch=2, frames=None, tube=None, size=(12, 8), patch=4, d=10, dtype=torch.float32, each=False, bytes=False):
    """[pixels, weight, class_embedding, position_embedding]; `each` frame has a class embedding of its own."""
    clip = [] if frames is None else [frames]
    weight = randn(d, 3, *([] if tube is None else [tube]), patch, patch, dtype=dtype, device=DEVICE, seed=1, scale=0.2)
    classes = randn(*([(frames or 1) // (tube or 1)] if each else []), d, dtype=dtype, device=DEVICE, seed=2)
    grid = (size[0] // patch) * (size[1] // patch)
    position = randn(1 + grid, d, dtype=dtype, device=DEVICE, seed=3)
    if bytes:
        generator = torch.Generator().manual_seed(4)
        pixels = torch.randint(0, 256, (batch, 3, *clip, *size), generator=generator, dtype=torch.uint8).to(DEVICE)
    else:
        pixels = randn(batch, 3, *clip, *size, dtype=dtype, device=DEVICE, seed=4)
    return [pixels, weight, classes, position]


def some(batch, grid, k):
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(grid, generator=generator)[:k] for _ in range(batch)]).to(DEVICE)


def options(function, **given):
    return lambda pixels, weight, classes, position: function(
        pixels, weight, class_embedding=classes, position_embedding=position, **given
    )


def check(impl, tensors, wanted=(), kept=None, **given):
    if tensors[0].dtype == torch.uint8:
        given |= {name: torch.tensor(value, device=DEVICE) for name, value in (("mean", MEAN), ("std", STD))}
    oracle = options(reference, kept=kept, **given)
    assert_matches(options(ops.patch_embed, kept=kept, impl=impl, **given), oracle, tensors, wanted)


@pytest.mark.parametrize("impl, dtype", EVERY)
@pytest.mark.parametrize("bytes", [False, True])
@pytest.mark.parametrize(
    "frames, tube, each",
    [(None, None, False), (None, 1, True), (4, None, False), (4, 1, True), (4, 2, True), (4, 4, False)],
)
def test_images_clips_and_tubes(impl, dtype, bytes, frames, tube, each):
    tensors = inputs(frames=frames, tube=tube, each=each, bytes=bytes, dtype=dtype)
    check(impl, tensors)
    check(impl, tensors, kept=some(2, 6, 3))


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "native"])
@pytest.mark.parametrize("bytes", [False, True])
def test_float64(impl, bytes):
    check(impl, inputs(frames=2, dtype=torch.float64, bytes=bytes), kept=some(2, 6, 4))


@pytest.mark.parametrize("impl, dtype", EVERY)
@pytest.mark.parametrize(
    "size, patch", [((28, 28), 14), ((14, 42), 14), ((7, 5), 1), ((9, 9), 3), ((32, 16), 16), ((13, 11), 4)]
)
def test_sizes(impl, dtype, size, patch):
    tensors = inputs(size=size, patch=patch, dtype=dtype)
    check(impl, tensors)
    check(impl, inputs(size=size, patch=patch, bytes=True, dtype=dtype), kept=some(2, len(tensors[3]) - 1, 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", [tuple(i == j for i in range(4)) for j in range(4)])
def test_each_gradient_alone(impl, wanted):
    check(impl, inputs(frames=2), wanted, kept=some(2, 6, 3))
    if not wanted[0]:
        check(impl, inputs(frames=2, bytes=True), wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl):
    pixels, *parameters = inputs(frames=4, tube=2)
    frames_first = pixels.transpose(1, 2).contiguous().transpose(1, 2)
    channels_last = pixels.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    every_second = randn(2, 3, 4, 24, 16, device=DEVICE)[..., ::2, ::2]
    for view in (frames_first, channels_last, every_second, pixels[:, :1].expand(-1, 3, -1, -1, -1)):
        check(impl, [view, *parameters])
    weight, *embeddings = parameters
    check(impl, [pixels, weight.flip(0).transpose(0, 1).contiguous().transpose(0, 1), *embeddings])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch, k", [(0, None), (2, 0), (1, 6), (0, 2)])
def test_empty(impl, batch, k):
    tensors = [t.requires_grad_() for t in inputs(batch=batch, frames=2)]
    kept = None if k is None else some(2, 6, k)[:batch]
    tokens = options(ops.patch_embed, kept=kept, impl=impl)(*tensors)
    assert tokens.shape == (2 * batch, 7 if k is None else 1 + k, 10)
    grads = torch.autograd.grad(tokens.sum(), tensors)
    assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(grads, tensors))
    assert grads[2].eq(2 * batch).all() and (k != 0 or grads[0].eq(0).all())


@pytest.mark.parametrize("impl", ["torch"] if DEVICE == "cuda" else ["torch", "triton"])
@pytest.mark.parametrize("bytes", [False, True])
def test_gradcheck(impl, bytes):
    pixels, *parameters = inputs(1, 2, 2, (5, 4), 2, 3, torch.float64, bytes=bytes)
    given = {"mean": MEAN, "std": STD} if bytes else {}
    op = options(ops.patch_embed, kept=some(1, 4, 2), impl=impl, **given)
    tensors = [t.requires_grad_(t.is_floating_point()) for t in (pixels, *parameters)]
    assert torch.autograd.gradcheck(op, tensors, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_bytes_equal_normalised_floats(impl):
    pixels, *parameters = inputs(bytes=True, size=(28, 42), patch=14)
    shape = (1, 3, 1, 1)
    floats = (pixels / 255 - torch.tensor(MEAN).view(shape).to(DEVICE)) / torch.tensor(STD).view(shape).to(DEVICE)
    actual = options(ops.patch_embed, mean=MEAN, std=STD, impl=impl)(pixels, *parameters)
    torch.testing.assert_close(actual, options(ops.patch_embed, impl=impl)(floats, *parameters), rtol=1e-4, atol=1e-5)


def test_bytes_in_bfloat16_lose_nothing():
    tensors = inputs(bytes=True, size=(56, 56), patch=14, d=64, dtype=torch.bfloat16)
    given = {"mean": torch.tensor(MEAN, device=DEVICE), "std": torch.tensor(STD, device=DEVICE)}
    exact = options(reference, **given)(tensors[0], *(t.double() for t in tensors[1:]))
    plain = options(reference, **given)(*tensors)
    assert_within_budget(options(ops.patch_embed, **given)(*tensors), exact, plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_kept_is_dropping_afterwards(impl):
    tensors = inputs(frames=2)
    kept = some(2, 6, 4)
    every = options(ops.patch_embed, impl=impl)(*tensors).unflatten(0, (2, 2))
    some_of_them = options(ops.patch_embed, impl=impl, kept=kept)(*tensors).unflatten(0, (2, 2))
    for clip, left, indices in zip(every, some_of_them, kept):
        torch.testing.assert_close(left[:, 1:], clip[:, 1 + indices])
        assert torch.equal(left[:, 0], clip[:, 0])
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    again = options(ops.patch_embed, impl=impl, kept=kept[:, order])(*tensors).unflatten(0, (2, 2))
    torch.testing.assert_close(again[:, :, 1:], some_of_them[:, :, 1 + order])


@pytest.mark.parametrize("impl", IMPLS)
def test_frames_are_images(impl):
    pixels, *parameters = inputs(frames=3)
    clips = options(ops.patch_embed, impl=impl)(pixels, *parameters)
    images = options(ops.patch_embed, impl=impl)(pixels.transpose(1, 2).flatten(0, 1), *parameters)
    torch.testing.assert_close(clips, images)


@pytest.mark.parametrize("impl, dtype", EVERY)
def test_pre_norm(impl, dtype):
    norm = (randn(10, device=DEVICE, seed=8), randn(10, device=DEVICE, seed=9), 1e-5)
    check(impl, inputs(frames=2, dtype=dtype), pre_norm=norm, kept=some(2, 6, 3))
    for each, bytes in ((False, True), (True, False)):
        check(impl, inputs(frames=2, each=each, bytes=bytes, dtype=dtype), pre_norm=norm)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bytes", [False, True])
def test_positions_may_be_added_later(impl, bytes):
    """What a compiled graph on a GPU may ask of any implementation."""
    pixels, weight, classes, position = inputs(frames=2, bytes=bytes)
    weight.requires_grad_()
    given = {name: torch.tensor(v, device=DEVICE) if bytes else None for name, v in (("mean", MEAN), ("std", STD))}
    without = torch.ops.lbfast.patch_embed(pixels, weight, classes, None, None, *given.values(), impl)
    want = options(ops.patch_embed, impl=impl, **given)(pixels, weight, classes, torch.zeros_like(position))
    torch.testing.assert_close(without, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), weight) for out in (without, want)))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_pre_norm(impl):
    tensors = inputs(frames=2)
    norm = (randn(10, device=DEVICE, seed=8), randn(10, device=DEVICE, seed=9), 1e-5)
    parameters = [t.requires_grad_() for t in norm[:2]]
    grads = [
        torch.autograd.grad(options(f, pre_norm=norm, **more)(*tensors).sin().sum(), parameters)
        for f, more in ((ops.patch_embed, {"impl": impl}), (reference, {}))
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kept", [None, some(3, 6, 2)])
def test_large_batches_in_pieces(monkeypatch, kept):
    tensors = [t.requires_grad_(t.is_floating_point()) for t in inputs(3, 2, bytes=True)]
    op = options(ops.patch_embed, kept=kept, mean=MEAN, std=STD, impl="triton")

    patch_embed = sys.modules["lbfast.ops.patch_embed"]

    def run():
        tokens = op(*tensors)
        return [tokens, *torch.autograd.grad(tokens.sin().sum(), tensors[1:])]

    whole = run()
    for clips in (0, 1, 2):
        monkeypatch.setattr(patch_embed, "PIECE_BYTES", clips * 2 * (7 if kept is None else 3) * 56 * 4)
        for piece, all_at_once in zip(run(), whole):
            torch.testing.assert_close(piece, all_at_once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bias_of_bytes_is_rounded_once(dtype):
    """Pixels of 128 leave nothing but the bias, which the matrix holds in two columns."""
    pixels, weight, *others = inputs(bytes=True, dtype=dtype, d=200)
    pixels, zeros = torch.full_like(pixels, 128), [torch.zeros_like(t) for t in others]
    actual = options(ops.patch_embed, mean=MEAN, std=STD, impl="triton")(pixels, weight, *zeros)[0, 1].double()
    mean, std = (torch.tensor(v, dtype=torch.float64, device=DEVICE).view(3, 1, 1) for v in (MEAN, STD))
    exact = (weight.double() * (128 / 255 - mean) / std).sum((1, 2, 3))
    assert ((actual - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-7).all()


def test_dtypes_of_pixels_and_weights():
    pixels, *parameters = inputs()
    half = [t.bfloat16() for t in parameters]
    tokens = options(ops.patch_embed)(pixels, *half)
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, options(ops.patch_embed)(pixels.bfloat16(), *half))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(tokens, options(ops.patch_embed)(pixels, *parameters))
    given = [t.requires_grad_() for t in (pixels, *parameters)]
    with torch.autocast(DEVICE, torch.bfloat16):
        tokens = options(ops.patch_embed)(*given)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(tokens.float().sum(), given))


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic(impl):
    pixels, *parameters = inputs(frames=4, bytes=True)
    tensors = [t.requires_grad_() for t in parameters]
    op = options(ops.patch_embed, kept=some(2, 6, 3), mean=MEAN, std=STD, impl=impl)

    def run():
        tokens = op(pixels, *tensors)
        return [tokens, *torch.autograd.grad(tokens.square().sum(), tensors)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bytes", [False, True])
def test_traces(impl, bytes):
    pixels, *parameters = inputs(frames=4, tube=2, each=True, bytes=bytes)
    tensors = [pixels, *(t.requires_grad_() for t in parameters)]
    kept = some(2, 6, 3)
    given = {name: torch.tensor(v, device=DEVICE) for name, v in (("mean", MEAN), ("std", STD))} if bytes else {}
    entry = torch.ops.lbfast.patch_embed.default
    torch.library.opcheck(entry, (*tensors, kept, given.get("mean"), given.get("std"), impl))
    step = options(ops.patch_embed, kept=kept, impl=impl, **given)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), step(*tensors))
    grads = [torch.autograd.grad(f(*tensors).square().sum(), tensors[1:]) for f in (compiled, step)]
    torch.testing.assert_close(*grads)
    module = type("Module", (torch.nn.Module,), {"forward": lambda self, *t: step(*t)})()
    detached = tuple(t.detach() for t in tensors)
    torch.testing.assert_close(torch.export.export(module, detached).module()(*detached), step(*detached))


def test_chooses():
    tensors = inputs()
    with lbfast.use_impl("triton"):
        torch.testing.assert_close(options(ops.patch_embed)(*tensors), options(reference)(*tensors))


@pytest.mark.skipif(DEVICE == "cuda", reason="the CPU's")
def test_native_checks_what_is_kept():
    pixels, weight, classes, position = inputs()
    for wrong in (-1, 6):
        with pytest.raises(IndexError, match=f"kept: expected 0..5, got {wrong}"):
            call = options(ops.patch_embed, kept=torch.tensor([[0], [wrong]]), impl="native")
            call(pixels, weight, classes, position)


def test_errors():
    pixels, weight, classes, position = inputs(frames=3)
    call = options(ops.patch_embed)
    with pytest.raises(
        ValueError, match=r"position_embedding: expected \(7, 10\) for 3 x 2 patches of 12 x 8 pixels, got \(6, 10\)"
    ):
        call(pixels, weight, classes, position[1:])
    with pytest.raises(ValueError, match=r"a number of frames that the weight's tube of 2 divides, got 3"):
        call(pixels, inputs(frames=4, tube=2)[1], classes, position)
    with pytest.raises(ValueError, match=r"class_embedding: expected \(10,\) or \(3, 10\), got \(2, 10\)"):
        call(pixels, weight, classes.expand(2, 10), position)
    with pytest.raises(ValueError, match=r"mean, std: expected both with uint8 pixels, got None"):
        call(pixels.byte(), weight, classes, position)
    with pytest.raises(ValueError, match=r"mean: expected \(3,\), got \(2,\)"):
        options(ops.patch_embed, mean=MEAN[:2], std=STD)(pixels.byte(), weight, classes, position)
    with pytest.raises(ValueError, match=r"mean, std: expected None with torch.float32 pixels"):
        options(ops.patch_embed, mean=MEAN, std=STD)(pixels, weight, classes, position)
    with pytest.raises(TypeError, match=r"pixels: expected uint8 or a floating dtype, got torch.int64"):
        call(pixels.long(), weight, classes, position)
    with pytest.raises(TypeError, match=r"kept: expected int64, got torch.int32"):
        options(ops.patch_embed, kept=some(2, 6, 3).int())(pixels, weight, classes, position)
    with pytest.raises(ValueError, match=r"kept: expected \(2, K\), got \(3, 3\)"):
        options(ops.patch_embed, kept=some(3, 6, 3))(pixels, weight, classes, position)
    with pytest.raises(ValueError, match=r"weight: expected \(D, 3, \[tube,\] P, P\)"):
        call(pixels, weight[:, :2], classes, position)


def test_conv3d_agrees():
    pixels, weight, classes, position = inputs(frames=4, tube=2, size=(8, 8))
    tokens = options(ops.patch_embed)(pixels, weight, classes, position).unflatten(0, (2, 2))[:, :, 1:] - position[1:]
    volume = F.conv3d(pixels, weight, stride=(2, 4, 4))  # (B, D, T', Gh, Gw)
    torch.testing.assert_close(tokens, volume.flatten(3).permute(0, 2, 3, 1))


@pytest.mark.gpu
def test_graph_capture():
    tensors = inputs(2, 4, None, (56, 56), 14, 64, torch.bfloat16, bytes=True)
    given = {name: torch.tensor(v, device=DEVICE) for name, v in (("mean", MEAN), ("std", STD))}
    op = options(ops.patch_embed, kept=some(2, 16, 8), **given)
    op(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = op(*tensors)
    tensors[0].copy_(tensors[0].flip(0))
    graph.replay()
    torch.testing.assert_close(tokens, op(*tensors))
