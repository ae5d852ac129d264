"""Plans of runs: their memory is what a run takes, their time adds up, and nothing is changed by making one."""

from __future__ import annotations

import gc
import itertools
import time

import pytest
import torch
from typer.testing import CliRunner

import lbfast.cli
from lbfast.model.config import published_config
from lbfast.model.languagebind import model_dict
from lbfast.training import memory, plan as plans
from lbfast.training.measure import LOSS_ROWS, Costs, Line
from lbfast.training.parameters import prepare
from lbfast.training.plan import plan
from lbfast.training.trainer import train
from tests import tiny, trainees

WIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 8}
FINE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "patch_size": 4}
"""Much of their memory is gradients and the optimizer's state, or activations. Python and libraries are 400 MiB."""


@pytest.fixture(autouse=True)
def _one_thread():
    with trainees.one_thread():
        yield


@pytest.mark.parametrize(
    ("modality", "lora_r", "micro_batch", "vision"),
    [("image", 0, 2, WIDE), ("image", 4, 8, FINE), ("video", 0, 2, {}), ("video", 4, 1, WIDE)],
)
def test_a_run_takes_what_was_planned(tmp_path, processes, modality, lora_r, micro_batch, vision):
    from tests import runs

    fields = {"modality": modality, "lora_r": lora_r, "micro_batch": micro_batch, "batch_size": 8, "epochs": 1}
    found = []
    for work, *arguments in ((runs.planned,), (runs.taken, tmp_path)):
        ours, theirs = processes.Pipe()
        child = processes.Process(target=work, args=({**fields, "vision": vision}, *arguments, theirs))
        child.start()
        theirs.close()
        found.append(ours.recv())
        child.join()
    print(f"planned {found[0] / memory.MIB:.1f} MiB, taken {found[1] / memory.MIB:.1f} MiB")
    assert found[0] == pytest.approx(found[1], rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("modality", "lora_r", "micro_batch"), [("image", 0, 16), ("image", 8, 32), ("video", 0, 4), ("video", 8, 8)]
)
def test_a_run_on_a_gpu_takes_what_was_planned(tmp_path, modality, lora_r, micro_batch):
    """Of L/14 with six layers: what PyTorch has allocated at the most, and how long a step takes."""
    device = torch.device("cuda")
    made = trainees.plan(modality, lora_r=lora_r, micro_batch=micro_batch, batch_size=64, epochs=4)
    config = published_config(modality)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 6
    with device:
        model = model_dict[modality](config)
    prepare(model, made)
    found = plan(made, model)
    data = trainees.Data(modality, 0, 64)
    side = (3, 8, 224, 224) if modality == "video" else (3, 224, 224)
    data.all.pixel_values, data.samples, data.steps_per_epoch = torch.randn(64, *side), 64, 1
    rows = trainees.rows("image", 64, length=77)
    data.all.input_ids, data.all.attention_mask, data.all.groups = rows.input_ids, rows.attention_mask, rows.groups
    times = []
    data.before = lambda step: (torch.cuda.synchronize(), times.append(time.perf_counter()))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(made, model, data, tmp_path, steps=3)
    torch.cuda.synchronize()
    taken, seconds = torch.cuda.max_memory_allocated(), min(b - a for a, b in itertools.pairwise(times))
    print(f"planned {found.peak / memory.MIB:.0f} MiB, {found.seconds:.3f} s")
    print(f"taken {taken / memory.MIB:.0f} MiB, {seconds:.3f} s")
    assert found.peak == pytest.approx(taken, rel=0.1)
    assert found.seconds == pytest.approx(seconds, rel=0.25)


def test_nothing_is_changed():
    made = trainees.plan(patch_dropout=0.5)
    model = trainees.trainee(made)
    before, state = trainees.weights(model), torch.get_rng_state()
    told: list[str] = []
    found = plan(made, model, trainees.Data(), tell=told.append)
    assert told[0] == "memory of a step of 4 rows" and len(set(told)) == len(told) >= 6
    assert trainees.same(trainees.weights(model), before) and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert (found.memory["gradients"], found.memory["optimizer"]) == (trained, 2 * trained)
    assert found.memory["weights"] == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert found.micro_batch == 2 and found.steps == 3 and found.seconds > 0 and found.fits


GIB = 2**30
COSTS = Costs(
    weights=1 * GIB, trained=GIB // 4, kept=Line(0, GIB / 8), backward=Line(0, GIB / 4), captions=Line(0, 0),
    loss=Line(0, 8192), pixels=0, resident=0.0, loading=0.0, once=1.0, again=1.5, caption=0.25, step=3.0,
    loss_seconds=2.0, flops=(2e12, 3e12, 1e12),
)  # fmt: skip


def test_arithmetic():
    """Of rounded costs: three quarters of a GiB for gradients and state, a quarter for each row of a micro-batch."""
    assert COSTS.live(4, 64, 64) == 2.75 * GIB + 64 * 4096
    table = plans._table(COSTS, 64, 4, 1)[64][1]
    assert table == {size: min(64, int((size * plans.SHARE - 1.75) // 0.25)) for size in plans.GPUS}
    assert plans._largest(COSTS, 4, 1, 2.75 * GIB + 100 * 4096) == 100
    assert plans._largest(COSTS, 4, 1, GIB) == 0
    seconds = plans._seconds(COSTS, 4, 16, 2 * LOSS_ROWS, 2, None)
    assert seconds == 4 * (1 + 3 * 1.5) + 16 * 0.25 + 3 + 2.0 * 4 / 2
    stated = plans._seconds(COSTS, 4, 16, 16, 1, 10)
    assert stated == pytest.approx((4 * (2 + 3 * 3) + 16 * 1) / 10, rel=1e-6)
    assert [plans.duration(s) for s in (0.25, 12, 600, 7200, 1e6)] == ["250 ms", "12 s", "10 min", "2 h", "11.6 days"]


def test_bad_arguments():
    made = trainees.plan()
    for wrong, message in (({"tflops": 0.0}, "tflops: expected a number above 0"), ({"world": 0}, "world: expected")):
        with pytest.raises(ValueError, match=message):
            plan(made, trainees.trainee(made), **wrong)


def test_the_command(tmp_path):
    data, model = trainees.manifest(tmp_path), tiny.checkpoint(tmp_path, "image")
    command = ["train", "--recipe", "depth", "--model", str(model), "--data", str(data)]
    settings = ["--set", "batch_size=8", "--set", "micro_batch=4", "--device", "cpu"]
    result = CliRunner().invoke(lbfast.cli.app, [*command, *settings, "--plan", "--tflops", "1"])
    assert result.exit_code == 0, result.stderr
    for said in (
        "weights ",
        "fits into",
        "micro-batch 4, global batch 8",
        "at 1 TFLOP/s",
        "an epoch of 2 steps",
        "141 GiB",
    ):
        assert said in result.stdout, result.stdout
    assert not list(tmp_path.glob("**/metrics.jsonl"))
    result = CliRunner().invoke(lbfast.cli.app, [*command, *settings])
    assert result.exit_code == 1 and "out: expected a directory for the run, got none" in result.stderr
