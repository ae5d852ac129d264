"""The losses over process groups of 1 to 4 ranks (gloo): equal to one process with the whole batch."""

import datetime
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from lbfast.losses import InfoNCELoss, SigLipLoss
from lbfast.ops import sigmoid_loss
from lbfast.ops.info_nce import IMPLEMENTATIONS, info_nce
from lbfast.testing import ROUNDING, randn, relative_error

WORLDS = (1, 2, 3, 4)
SIZES = ((6, 6, 6, 6), (5, 70, 1, 0), (0, 3, 2, 9))
PATIENCE = datetime.timedelta(seconds=20)  # where a rank dies
LONG = datetime.timedelta(seconds=300)  # where ranks wait for what others still check

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def batch(total, dtype):
    x, y = (F.normalize(randn(total, 24, seed=seed), dim=-1).to(dtype) for seed in (0, 1))
    return x, y, torch.tensor(14.3), torch.arange(total) % max(2, total // 3)


def grads_of(x, y, s, needs=(True, True, True), **options):
    x, y, s = (t.detach().clone().requires_grad_(need) for t, need in zip((x, y, s), needs))
    loss = info_nce(x, y, s, **options)
    loss.backward()
    return loss.detach(), x.grad, y.grad, s.grad


def equals_one_process(
    group, rank, sizes, gather, impl, dtype, needs=(True, True, True), smoothing=0.0, groups=False, dims=None
):
    x, y, s, ids = batch(sum(sizes), dtype)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    options = {"impl": impl, "label_smoothing": smoothing, "dims": dims}
    one = grads_of(x, y, s, needs, ids=ids if groups else None, **options)
    ours = grads_of(x[own], y[own], s, needs, ids=ids[own] if groups else None, group=group, gather=gather, **options)
    for what, a, b in zip(("loss", "image", "text", "scale"), ours, one):
        if what in ("image", "text") and b is not None:
            b = b[own]
        where = f"{what}: rank {rank} of {len(sizes)}, {sizes}, {gather}, {impl}, {needs}"
        assert (a is None) == (b is None), where
        if a is not None:
            error = relative_error(a, b)
            assert error <= 8 * ROUNDING[dtype], f"{where}: {error:.1e}"


def hard_negatives_equal_one_process(group, rank, sizes, gather, direction):
    """Rank r has r more texts than images; of one process, all of them follow all pairs."""
    x, y, s, ids = batch(sum(sizes) + sum(range(len(sizes))), torch.float32)
    x, pairs, world = x[: sum(sizes)], sum(sizes), range(len(sizes))
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    extra = slice(pairs + sum(world[:rank]), pairs + sum(world[: rank + 1]))
    mine = torch.cat([y[own], y[extra]]), torch.cat([ids[own], ids[extra]])
    one = grads_of(x, y, s, ids=ids, direction=direction)
    ours = grads_of(x[own], mine[0], s, ids=mine[1], direction=direction, group=group, gather=gather)
    wanted = (one[0], one[1][own], torch.cat([one[2][own], one[2][extra]]), one[3])
    for what, a, b in zip(("loss", "image", "text", "scale"), ours, wanted):
        where = f"{what}: rank {rank} of {sizes}, {gather}, {direction}"
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, w=where: f"{w}\n{text}")


def sigmoid_equals_one_process(group, rank, sizes, gather, impl, dtype, needs=(True,) * 4, groups=False):
    """Rank r has r more texts than images; of one process, all of them follow all pairs."""
    pairs, world = sum(sizes), range(len(sizes))
    x, y, s, ids = batch(pairs + sum(world), dtype)
    given = (x[:pairs], y, s, torch.tensor(-5.0))
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    extra = slice(pairs + sum(world[:rank]), pairs + sum(world[: rank + 1]))

    def of(*tensors, **options):
        tensors = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, needs)]
        loss = sigmoid_loss(*tensors, **options)
        loss.backward()
        return loss.detach(), *(t.grad for t in tensors)

    mine = torch.cat([y[own], y[extra]]), torch.cat([ids[own], ids[extra]])
    one = of(*given, ids=ids if groups else None, impl=impl)
    ours = of(x[own], mine[0], *given[2:], ids=mine[1] if groups else None, impl=impl, group=group, gather=gather)
    dy = None if one[2] is None else torch.cat([one[2][own], one[2][extra]])
    wanted = (one[0], None if one[1] is None else one[1][own], dy, *one[3:])
    for what, a, b in zip(("loss", "image", "text", "scale", "bias"), ours, wanted):
        where = f"sigmoid {what}: rank {rank} of {len(sizes)}, {sizes}, {gather}, {impl}, {needs}"
        assert (a is None) == (b is None), where
        error = 0.0 if a is None else relative_error(a, b)
        assert error <= 8 * ROUNDING[dtype], f"{where}: {error:.1e}"


def trains_as_one_process(group, rank, world, gather):
    """DistributedDataParallel with each loss: every parameter's gradient is that of one process."""

    class Towers(torch.nn.Module):
        def __init__(self, biased):
            super().__init__()
            torch.manual_seed(0)
            self.image, self.text = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
            self.log_scale = torch.nn.Parameter(torch.tensor(2.0))
            self.bias = torch.nn.Parameter(torch.tensor(-3.0), requires_grad=biased)

        def forward(self, x, y):
            image, text = F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1)
            return image, text, self.log_scale.exp(), self.bias if self.bias.requires_grad else None

    x, y = randn(4 * world, 8, seed=2), randn(4 * world, 8, seed=3)
    own = slice(4 * rank, 4 * rank + 4)
    for kind in (InfoNCELoss, SigLipLoss):
        single = Towers(kind is SigLipLoss)
        kind()(*single(x, y)).backward()
        parallel = torch.nn.parallel.DistributedDataParallel(Towers(kind is SigLipLoss), process_group=group)
        kind(world_size=world, rank=rank, group=group, gather=gather)(*parallel(x[own], y[own])).backward()
        for (name, a), b in zip(single.named_parameters(), parallel.module.parameters()):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}\n{text}")


def disagreement_raises(group, rank, world):
    with pytest.raises(ValueError, match="on every rank"):
        info_nce(torch.zeros(2, 3 + rank), torch.zeros(2, 3 + rank), 1.0, group=group)
    x, odd = torch.zeros(2, 3), rank == world - 1
    for name, options in (
        ("gather='ring'", {"gather": "ring" if odd else "all"}),
        ("ids given", {"ids": torch.arange(2) if odd else None}),
        ("label_smoothing", {"label_smoothing": 0.1 if odd else 0.2}),
        ("text_embeds.requires_grad", {}),
    ):
        y = x.clone().requires_grad_(odd and not options)
        with pytest.raises(ValueError, match=f"on every rank, got on ranks 0 to {world - 1}: {name} "):
            info_nce(x, y, 1.0, group=group, **options)
    with pytest.raises(ValueError, match="at least one row"):
        info_nce(torch.zeros(0, 3), torch.zeros(0, 3), 1.0, group=group)
    with pytest.raises(ValueError, match=f"got on ranks 0 to {world - 1}: logit_bias.requires_grad "):
        sigmoid_loss(x, x, 1.0, torch.zeros(()).requires_grad_(odd), group=group)


def every_check(rank, folder):
    start(rank, 4, folder, LONG)
    for world in WORLDS:
        group = dist.new_group(list(range(world)), timeout=LONG)
        if rank >= world:
            continue
        for sizes in SIZES:
            sizes = sizes[:world]
            if sum(sizes) == 0:
                continue
            for gather in ("all", "ring"):
                for impl in ("torch", "native"):
                    if not IMPLEMENTATIONS[impl](torch.zeros(1, 1), torch.zeros(1, 1)):
                        equals_one_process(group, rank, sizes, gather, impl, torch.float32)
                one_side = ((True, False, True), (False, True, False), (False, False, True))
                for needs in one_side:
                    equals_one_process(group, rank, sizes, gather, "torch", torch.float32, needs)
                equals_one_process(group, rank, sizes, gather, None, torch.bfloat16)
                equals_one_process(group, rank, sizes, gather, None, torch.float32, groups=True)
                equals_one_process(group, rank, sizes, gather, None, torch.float32, smoothing=0.1)
                equals_one_process(group, rank, sizes, gather, None, torch.float32, groups=True, smoothing=0.1)
                for groups in (False, True):
                    equals_one_process(group, rank, sizes, gather, None, torch.float32, groups=groups, dims=(24, 10))
                for needs in ((True,) * 4, (True, False, True, False), (False, True, False, True)):
                    sigmoid_equals_one_process(group, rank, sizes, gather, "torch", torch.float32, needs)
                sigmoid_equals_one_process(group, rank, sizes, gather, None, torch.bfloat16, groups=True)
        for gather in ("all", "ring"):
            for direction in ("both", "image", "text"):
                hard_negatives_equal_one_process(group, rank, SIZES[1][:world], gather, direction)
            trains_as_one_process(group, rank, world, gather)
        if world > 1:
            disagreement_raises(group, rank, world)
    dist.barrier()
    dist.destroy_process_group()


def one_dies(rank, folder, gather, when):
    """Rank 1 ends without a word before its forward or its backward; the others must raise."""
    start(rank, 3, folder, PATIENCE)
    (Path(folder) / f"started_{rank}").touch()
    while rank == 1 and len(list(Path(folder).glob("started_*"))) < 3:  # the others are still connecting
        time.sleep(0.01)
    x, y = randn(4, 8, seed=rank).requires_grad_(), randn(4, 8, seed=rank + 9).requires_grad_()
    if rank == 1 and when == "forward":
        os._exit(0)
    begun = time.monotonic()
    try:
        loss = info_nce(x, y, 5.0, group=dist.group.WORLD, gather=gather, impl="torch")
        if rank == 1:
            os._exit(0)
        loss.backward()
    except RuntimeError:
        with open(os.path.join(folder, f"raised_{rank}"), "w") as file:
            file.write(f"{time.monotonic() - begun}")
    os._exit(0)


def run(function, world, *arguments):
    multiprocessing.set_forkserver_preload([__name__])  # the imports are done once
    mp.start_processes(function, arguments, nprocs=world, start_method="forkserver")


def start(rank, world, folder, patience):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=patience)


def test_equals_one_process(tmp_path):
    run(every_check, 4, str(tmp_path))


@pytest.mark.parametrize(("gather", "when"), [("all", "forward"), ("ring", "backward")])
def test_dead_rank_raises_on_the_others(tmp_path, gather, when):
    run(one_dies, 3, str(tmp_path), gather, when)
    waited = [float((tmp_path / f"raised_{rank}").read_text()) for rank in (0, 2)]
    assert max(waited) < PATIENCE.total_seconds() + 10
