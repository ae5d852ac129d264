"""Tokens of pixels as inference on a CPU makes them: one native product, positions and the norm."""

import pytest
import torch
import torch.nn.functional as F

from lbfast import testing, tokenwise
from lbfast.model.config import MODALITIES
from lbfast.model.frozen_tokens import FrozenTokens
from lbfast.model.layers import LayerNorm
from lbfast.model.tokens import VisionEmbeddings
from tests import tiny
from tests.test_tokenwise import KERNELS, each_kernel

pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels here")


@pytest.mark.parametrize("shape", [(1, 16, 16, 1), (67, 80, 48, 5), (530, 592, 64, 257)])  # M, K, D, N
@each_kernel
def test_a_product_with_positions_and_a_norm(dtype, kernel, shape):
    rows, inputs, outputs, places = shape
    torch.manual_seed(0)
    patches, weight = torch.randn(rows, inputs).double(), torch.randn(outputs, inputs).double() * inputs**-0.5
    bias, positions = torch.randn(outputs).double(), torch.randn(places, outputs).double()
    norm = [torch.randn(outputs).double() for _ in range(2)]

    def plain(of):
        at = positions.to(of)[torch.arange(rows) % places]
        total = F.linear(patches.to(of), weight.to(of), bias.to(of)) + at
        return F.layer_norm(total, (outputs,), norm[0].to(of), norm[1].to(of))

    layer = tokenwise.product(weight, bias, dtype, kernel=kernel)
    outside = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    got = tokenwise.embed(patches.to(outside), layer, positions.float(), [n.float() for n in norm], kernel=kernel)
    exact = plain(torch.float64)
    assert got.dtype == torch.float32
    if dtype == torch.int8:
        assert testing.relative_error(got, exact) <= 0.02
    else:
        testing.assert_within_budget(got.to(outside), exact, plain(outside))


@each_kernel
def test_threads_make_no_difference(dtype, kernel):
    torch.manual_seed(0)
    layer = tokenwise.product(torch.randn(48, 64), torch.randn(48), dtype, kernel=kernel)
    patches, positions, norm = torch.randn(301, 64), torch.randn(7, 48), [torch.randn(48), torch.randn(48)]
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(tokenwise.embed(patches, layer, positions, norm, kernel=kernel))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0], other) for other in made)


def test_wrong_parts_are_refused():
    layer = tokenwise.product(torch.randn(48, 32), torch.randn(48), torch.float32, kernel="plain")
    right = {
        "patches": torch.zeros(4, 32),
        "layer": layer,
        "positions": torch.zeros(2, 48),
        "norm": [torch.ones(48)] * 2,
    }
    for change, message in [
        ({"patches": torch.zeros(4, 31)}, "K a multiple of 16"),
        ({"patches": torch.zeros(4, 32).half()}, "expected float32 or bfloat16"),
        ({"patches": torch.zeros(4, 48)}, "expected panels of 48 x 48"),
        ({"layer": []}, "expected a product's tensors"),
        ({"positions": torch.zeros(0, 48)}, "positions: expected"),
        ({"positions": torch.zeros(2, 40)}, "D a multiple of 16"),
        ({"positions": torch.zeros(2, 48).double()}, "positions: expected 96 contiguous float32"),
        ({"norm": [torch.ones(48)]}, "norm: expected 2 tensors"),
        ({"norm": [torch.ones(48), torch.ones(47)]}, "norm: expected 48"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            tokenwise.embed(*{**right, **change}.values(), kernel="plain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pixels", [torch.float32, torch.uint8, torch.float64])
@pytest.mark.parametrize("tube", [1, 2])
def test_as_the_op_makes_them(tube, pixels, dtype):
    if tokenwise.why_not(48, 96, dtype):
        pytest.skip("no panels of this dtype here")
    more = {"clip_type": "vl_new", "tube_size": 2} if tube > 1 else {}
    config = tiny.config("video", hidden_size=48, patch_size=7, image_size=21, num_frames=4, **more).vision_config
    embeddings, norm = VisionEmbeddings(config, MODALITIES["video"]), LayerNorm(48)
    for parameter in (*embeddings.parameters(), *norm.parameters()):
        torch.nn.init.normal_(parameter)
    size = (2, 3, 4, 21, 21)
    given = torch.randint(0, 256, size).to(pixels) if pixels == torch.uint8 else torch.randn(size, dtype=pixels)
    with torch.no_grad():
        exact = embeddings.double()(given if pixels == torch.uint8 else given.double(), pre_norm=norm.double())
        embeddings.to(dtype), norm.to(dtype)
        made = FrozenTokens(embeddings, norm)(given)
        usual = embeddings(given.to(dtype) if pixels == torch.float64 else given, pre_norm=norm)
    assert made.dtype == torch.float32 and made.shape == usual.shape
    testing.assert_within_budget(made.to(dtype), exact, usual)


def test_made_once_and_good_in_any_mode():
    """Panels that were laid in inference mode serve calls outside of it; raw and float pixels have each their own."""
    embeddings, norm = VisionEmbeddings(tiny.config("image").vision_config, MODALITIES["image"]), LayerNorm(32)
    made = FrozenTokens(embeddings.requires_grad_(False), norm.requires_grad_(False))
    for given in (torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), torch.randn(2, 3, 64, 64)):
        with torch.inference_mode():
            first = made(given)
        again = made(given)
        assert torch.equal(first, again) and not again.is_inference() and not again.requires_grad
        torch.testing.assert_close(again, embeddings(given, pre_norm=norm), rtol=1e-5, atol=1e-5)
