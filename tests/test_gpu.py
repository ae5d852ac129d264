"""On a GPU alone: every Triton kernel at LanguageBind's own shapes and types, large grids, CUDA graphs, NCCL.

`make gpu` runs these, with the other tests that are marked so, and marks the figures of an op that fails one.
"""

from __future__ import annotations

import datetime

import pytest
import torch

from bench import bench_attention, bench_layer_norm, bench_mlp, bench_patch_embed, bench_temporal_attention, peers
from lbfast import ops
from lbfast.reference.attention import attention
from lbfast.reference.info_nce import info_nce
from lbfast.reference.layer_norm import layer_norm
from lbfast.reference.mlp import mlp
from lbfast.reference.patch_embed import patch_embed
from lbfast.reference.sigmoid_loss import sigmoid_loss
from lbfast.reference.temporal_attention import temporal_attention
from lbfast.testing import assert_matches, randn

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BFLOAT16, OTHERS = torch.bfloat16, (torch.float16, torch.float32)


def matrix(names: str, *cases: tuple) -> pytest.MarkDecorator:
    """Every case in bfloat16, which the interpreter can't compute, and the first in the other dtypes."""
    every = [(*case, BFLOAT16) for case in cases] + [(*cases[0], dtype) for dtype in OTHERS]
    return pytest.mark.parametrize(f"{names}, dtype", every, ids=lambda value: str(value).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _exact_float32():
    """No tf32, in ours or in what it is compared with."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def new(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    return randn(*shape, dtype=dtype, device=DEVICE, seed=seed, scale=scale)


@matrix("n, d, causal", (257, 64, False), (257, 80, False), (593, 64, False), (77, 64, True))
def test_attention(n, d, causal, dtype):
    assert_matches(
        lambda *x: ops.attention(*x, causal=causal, impl="triton"),
        lambda *x: attention(*x, causal=causal),
        [new(2, n, 4, d, dtype=dtype, seed=i) for i in range(3)],
        plain=lambda *x: bench_attention.eager(*x, causal=causal),
    )


@matrix("d", (64,), (80,))
def test_temporal_attention(d, dtype):
    assert_matches(
        lambda *x: ops.temporal_attention(*x, impl="triton"),
        temporal_attention,
        [new(2, 8, 257, 2, d, dtype=dtype, seed=i) for i in range(3)],
        plain=lambda *x: bench_temporal_attention.moved(bench_attention.eager, *x),
    )


@matrix("width", (1024,), (1280,))
def test_layer_norm(width, dtype):
    x, residual = new(2, 8, 257, width, dtype=dtype, seed=0), new(1, 8, 1, width, dtype=dtype, seed=1)
    assert_matches(
        lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r, impl="triton"),
        lambda x, w, b, r: layer_norm(x, w, b, residual=r),
        [x, new(width, dtype=dtype, seed=2), new(width, dtype=dtype, seed=3), residual],
        plain=bench_layer_norm.eager,
    )


@matrix("activation", ("gelu",), ("quick_gelu",))
def test_mlp(activation, dtype):
    shapes = ((514, 1024), (4096, 1024), (4096,), (1024, 4096), (1024,))
    assert_matches(
        lambda *x: ops.mlp(*x, activation=activation, impl="triton"),
        lambda *x: mlp(*x, activation=activation),
        [new(*shape, dtype=dtype, seed=i, scale=shape[-1] ** -0.5) for i, shape in enumerate(shapes)],
        plain=lambda *x: bench_mlp.eager(*x, activation=activation),
    )


@pytest.mark.parametrize("dtype", (BFLOAT16, *OTHERS), ids=str)
def test_patch_embed(dtype):
    pixels = torch.randint(0, 256, (2, 3, 4, 224, 224), dtype=torch.uint8, device=DEVICE)
    kept = torch.stack([torch.randperm(256)[:100] for _ in range(2)]).to(DEVICE)
    constants = {"mean": bench_patch_embed.MEAN, "std": bench_patch_embed.STD}
    about = {name: torch.tensor(value, device=DEVICE) for name, value in constants.items()}

    def call(function, **more):
        return lambda weight, classes, position: function(
            pixels, weight, class_embedding=classes, position_embedding=position, kept=kept, **about, **more
        )

    shapes = ((1024, 3, 14, 14), (1024,), (257, 1024))
    assert_matches(
        call(ops.patch_embed, impl="triton"),
        call(patch_embed),
        [new(*shape, dtype=dtype, seed=i, scale=0.05) for i, shape in enumerate(shapes)],
        plain=call(bench_patch_embed.eager),
    )


def embeddings(size, dim, dtype):
    rows = (torch.nn.functional.normalize(randn(size, dim, seed=i), dim=-1) for i in range(2))
    return [*(x.to(DEVICE, dtype) for x in rows), torch.tensor(14.3, device=DEVICE)]


@matrix("size, dim", (257, 768), (4096, 1024))
def test_info_nce(size, dim, dtype):
    assert_matches(
        lambda *x: ops.info_nce(*x, impl="triton"),
        info_nce,
        embeddings(size, dim, dtype),
        plain=peers.clip_loss if dtype == torch.float32 else peers.clip_loss_row_chunked,
    )


@matrix("size, dim", (257, 768), (4096, 1024))
def test_sigmoid_loss(size, dim, dtype):
    assert_matches(
        lambda *x: ops.sigmoid_loss(*x, impl="triton"),
        sigmoid_loss,
        [*embeddings(size, dim, dtype), torch.tensor(-10.0, device=DEVICE)],
        plain=peers.siglip_loss if dtype == torch.float32 else peers.siglip_loss_row_chunked,
    )


def test_info_nce_of_many_rows():
    """65,536 rows: logits of 8 GiB, were they stored; the loss and a gradient as row chunks give them."""
    tensors = [t.requires_grad_() for t in embeddings(65536, 256, torch.bfloat16)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = ops.info_nce(*tensors, impl="triton", workspace_mib=256)
    grad = torch.autograd.grad(loss, tensors)[0]
    assert (torch.cuda.max_memory_allocated() - before) / 2**20 < 1024
    expected = peers.clip_loss_row_chunked(*tensors)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    theirs = torch.autograd.grad(expected, tensors)[0]
    assert torch.nn.functional.cosine_similarity(grad.double().flatten(), theirs.double().flatten(), dim=0) > 0.999


def test_layer_norm_beyond_int32():
    """More than 2^31 numbers: the last rows come out as they do alone."""
    rows = 2**31 // 1024 + 100
    if torch.cuda.get_device_properties(0).total_memory < 6 * rows * 2048:
        pytest.skip("needs a GPU with more memory")
    x = torch.randn(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
    weight, bias = new(1024, dtype=torch.bfloat16, seed=1), new(1024, dtype=torch.bfloat16, seed=2)
    every = ops.layer_norm(x, weight, bias, impl="triton")[-100:]
    assert torch.equal(every, ops.layer_norm(x[-100:].clone(), weight, bias, impl="triton"))


def test_info_nce_in_a_cuda_graph():
    """Forward and backward, captured once, on new embeddings of the same shape."""
    tensors = [t.requires_grad_() for t in embeddings(512, 256, torch.bfloat16)]

    def step():
        loss = ops.info_nce(*tensors, impl="triton")
        return loss, *torch.autograd.grad(loss, tensors)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = step()
        with torch.no_grad():
            for tensor in tensors[:2]:
                tensor.copy_(tensor.flip(0) * 0.5)
        graph.replay()
        expected = step()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_nccl_world_of_one(gather, tmp_path):
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        pytest.skip("torch without NCCL")
    tensors = [t.requires_grad_() for t in embeddings(300, 128, torch.bfloat16)]
    alone = ops.info_nce(*tensors)
    expected = [alone.detach(), *torch.autograd.grad(alone, tensors)]
    patience = datetime.timedelta(seconds=60)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1, timeout=patience)
    try:
        loss = ops.info_nce(*tensors, group=dist.group.WORLD, gather=gather)
        got = [loss.detach(), *torch.autograd.grad(loss, tensors)]
    finally:
        dist.destroy_process_group()
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)
