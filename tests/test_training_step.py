"""The large-batch step equals the dense step: every gradient, whatever the micro-batch and the processes."""

from __future__ import annotations

import datetime
import multiprocessing
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lbfast.model.languagebind import model_dict
from lbfast.training import memory
from lbfast.training.captions import TextCache
from lbfast.training.checkpoints import load
from lbfast.training.engine import Place, full, wrap
from lbfast.training.exporter import export
from lbfast.training.parameters import groups, trained
from lbfast.training.step import LargeBatchStep, Towers
from lbfast.training.trainer import train
from tests import trainees

BOUND = 1e-5
CPU = torch.device("cpu")


def gradients(step, batch):
    model = step.inner.model
    model.zero_grad()
    result = step(batch, trainees.STEP)
    return result, {name: full(parameter.grad).clone() for name, parameter in trained(model).items()}


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("modality", ["depth", "video"])
def test_equals_the_dense_step(modality, rank, text):
    plan = trainees.plan(modality, lora_r=rank, train_text=text, lock_image=False, patch_dropout=0.5)
    model, batch = trainees.trainee(plan), trainees.rows(modality, 7)
    loss, wanted = trainees.dense(model, batch, plan)
    for micro_batch in (1, 2, 3, 5, 7, 100):
        result, found = gradients(LargeBatchStep(Towers(model), micro_batch), batch)
        assert result.rows == 7
        assert result.loss.item() == pytest.approx(loss, rel=1e-6)
        error, name = trainees.worst(found, wanted)
        assert error <= BOUND, f"{name}: {error:.1e} at a micro-batch of {micro_batch}"


def test_patch_dropout_changes_with_the_step_and_the_seed():
    plan = trainees.plan(patch_dropout=0.5)
    model, batch = trainees.trainee(plan), trainees.rows("depth", 4)
    losses = [
        LargeBatchStep(Towers(model), 2, seed=s)(batch, n).loss.item() for s, n in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


def test_adapter_dropout_repeats_in_the_second_pass():
    """With LoRA dropout, the gradients are those of the very loss that was returned: finite differences agree."""
    plan = trainees.plan(lora_r=4, lora_dropout=0.5)
    model, batch = trainees.trainee(plan).double(), trainees.rows("depth", 5)
    batch.pixel_values = batch.pixel_values.double()
    step = LargeBatchStep(Towers(model), 2)
    _, found = gradients(step, batch)
    name = next(name for name in found if ".lora_B" in name)
    direction, width = found[name] / found[name].norm(), 1e-5
    losses = []
    for sign in (1, -1):
        model.get_parameter(name).data.add_(direction * sign * width)
        losses.append(step(batch, trainees.STEP).loss.item())
        model.get_parameter(name).data.sub_(direction * sign * width)
    assert (losses[0] - losses[1]) / (2 * width) == pytest.approx(found[name].norm().item(), rel=1e-4)


def test_the_generators_outside_are_left_alone():
    model, batch = trainees.trainee(trainees.plan(lora_dropout=0.5)), trainees.rows("depth", 4)
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    LargeBatchStep(Towers(model), 2)(batch, 0)
    assert torch.equal(torch.rand(3), wanted)


def test_loss_options():
    plan = trainees.plan(lora_r=0, label_smoothing=0.1)
    model, batch = trainees.trainee(plan), trainees.rows("depth", 6)
    loss, wanted = trainees.dense(model, batch, plan, mask_repeats=True)
    step = LargeBatchStep(Towers(model), 4, label_smoothing=0.1, mask_repeats=True)
    result, found = gradients(step, batch)
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert trainees.worst(found, wanted)[0] <= BOUND


def test_nested_embeddings():
    plan = trainees.plan(dims=[16, 8])
    model, batch = trainees.trainee(plan), trainees.rows("depth", 7)
    assert plan.dims == (16, 8) and plan.to_dict()["dims"] == [16, 8]
    loss, wanted = trainees.dense(model, batch, plan)
    result, found = gradients(LargeBatchStep(Towers(model), 3, dims=plan.dims), batch)
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert trainees.worst(found, wanted)[0] <= BOUND
    for wrong in ([], [8, 4.0], 8):
        with pytest.raises(ValueError, match="dims: expected a list of whole numbers"):
            trainees.plan(dims=wrong)


@pytest.mark.parametrize("learn_temperature", [True, False])
def test_sigmoid_loss(learn_temperature, tmp_path):
    """Its bias is trained, and is in no exported model."""
    plan = trainees.plan(loss="sigmoid", learn_temperature=learn_temperature)
    model, batch = trainees.trainee(plan), trainees.rows("depth", 7)
    loss, wanted = trainees.dense(model, batch, plan, mask_repeats=True)
    assert "logit_bias" in wanted and model.logit_bias.item() == -10
    for micro_batch in (3, 7):
        result, found = gradients(LargeBatchStep(Towers(model), micro_batch, loss="sigmoid", mask_repeats=True), batch)
        assert result.loss.item() == pytest.approx(loss, rel=1e-6)
        assert trainees.worst(found, wanted)[0] <= BOUND
    for style in ("upstream", "plain"):
        export(model, tmp_path / style, style)
        again = model_dict["depth"].from_pretrained(tmp_path / style)
        assert torch.equal(again.visual_projection.weight, model.visual_projection.weight)
        assert not hasattr(again, "logit_bias")
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0 with loss 'sigmoid', got 0\.1"):
        trainees.plan(loss="sigmoid", label_smoothing=0.1)


@pytest.mark.parametrize("what", ["attention", "layers"])
@pytest.mark.parametrize("modality", ["depth", "video"])
def test_recomputation_changes_nothing_but_memory(modality, what):
    plan = trainees.plan(modality, lora_r=0, patch_dropout=0.5)
    model, batch = trainees.trainee(plan), trainees.rows(modality, 5)
    towers = Towers(model)

    def saved():
        inputs = batch.pixel_values, batch.input_ids, batch.attention_mask, None
        return memory.saved_bytes(towers, lambda: towers(*inputs)) - batch.pixel_values.nbytes

    _, wanted = gradients(LargeBatchStep(towers, 2), batch)
    before = saved()
    memory.recompute(model.vision_model.encoder, what)
    _, found = gradients(LargeBatchStep(towers, 2), batch)
    after = saved()
    assert trainees.worst(found, wanted)[0] <= BOUND
    assert after < {"attention": 0.95, "layers": 0.5}[what] * before
    memory.recompute(model.vision_model.encoder, "none")
    assert saved() == before


def test_offloaded_activations_come_back():
    plan = trainees.plan(lora_r=0)
    model, batch = trainees.trainee(plan), trainees.rows("depth", 5)
    _, wanted = gradients(LargeBatchStep(Towers(model), 2), batch)
    _, found = gradients(LargeBatchStep(Towers(model), 2, offload=True), batch)
    assert trainees.worst(found, wanted)[0] == 0


@pytest.mark.gpu
def test_offloaded_activations_leave_the_gpu():
    """Of tensors that are worth a copy: 256 rows of nine tokens of 256 numbers are 2.25 MiB."""
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    plan = trainees.plan(lora_r=0, vision=wide)
    model, batch = trainees.trainee(plan).cuda(), trainees.rows("depth", 256)
    taken, found = [], []
    for offload in (False, True):
        step = LargeBatchStep(Towers(model), 256, offload=offload)
        gradients(step, batch)
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found.append({name: gradient.cpu() for name, gradient in gradients(step, batch)[1].items()})
        taken.append(torch.cuda.max_memory_allocated() - before)
        model.zero_grad(set_to_none=True)
    print(f"{taken[0] / 2**20:.0f} MiB, offloaded {taken[1] / 2**20:.0f} MiB")
    assert trainees.worst(found[1], found[0])[0] <= BOUND
    assert taken[1] < taken[0] / 2


class Counted(Towers):
    """Counts the rows whose graph is alive."""

    alive = most = 0

    def forward(self, *inputs):
        image, text, scale = super().forward(*inputs)
        if torch.is_grad_enabled():
            self.alive += len(image)
            self.most = max(self.most, self.alive)
            image.register_hook(self.freed)
        return image, text, scale

    def freed(self, gradient):
        self.alive -= len(gradient)


def test_graphs_do_not_grow_with_the_batch():
    model, peaks = trainees.trainee(trainees.plan(lora_r=0)), []
    for count in (4, 16):
        towers = Counted(model)
        LargeBatchStep(towers, 4)(trainees.rows("depth", count), 0)
        assert towers.alive == 0
        peaks.append(towers.most)
    assert peaks == [4, 4]


def test_micro_batch_from_a_budget():
    plan = trainees.plan(micro_batch=None, lora_r=0, vision={"num_hidden_layers": 6, "hidden_size": 64})
    model = trainees.trainee(plan)
    towers = Towers(model)

    def fitting(**changes):
        changed = plan.replace(**changes)
        memory.recompute(model.vision_model.encoder, changed.checkpointing)
        return memory.fitting_rows(towers, changed, CPU, lambda: torch.autocast("cpu", enabled=False), 1000)

    few, more = fitting(memory_budget_mib=1), fitting(memory_budget_mib=4)
    batch = trainees.rows("depth", few)
    inputs = batch.pixel_values, batch.input_ids, batch.attention_mask, None
    assert memory.saved_bytes(towers, lambda: towers(*inputs)) <= 2**20
    assert 1 < few < more < 1000
    assert fitting(memory_budget_mib=1e-3) == 1
    assert fitting(memory_budget_mib=1e6) == 1000
    assert few < fitting(memory_budget_mib=1, checkpointing="layers")


def test_what_was_measured_is_freed():
    """A node that saves what it gives, as that of exp does, holds it for ever where a hook hands on the tensor."""
    given, made = torch.zeros(4, requires_grad=True), []

    def run():
        made.append(weakref.ref(given.exp()))

    assert memory.saved_bytes(torch.nn.Identity(), run) == given.nbytes
    with memory.Offload(torch.nn.Identity())():
        run()
    assert [x() for x in made] == [None, None]


def test_captions_on_disk(tmp_path, monkeypatch):
    plan = trainees.plan()
    model, batch = trainees.trainee(plan), trainees.rows("depth", 9)
    towers = Towers(model)
    wanted = LargeBatchStep(towers, 4).embed_captions(batch.input_ids, batch.attention_mask)
    for _ in range(2):  # the second time by a new process, from the file
        cache = TextCache(tmp_path, "weights", 16)
        found = LargeBatchStep(towers, 4, cache=cache).embed_captions(batch.input_ids, batch.attention_mask)
        assert torch.equal(found, wanted)
        assert len(cache) == 9
        monkeypatch.setattr(towers, "captions", None)  # nothing is left to embed
    assert len(TextCache(tmp_path, "other weights", 16)) == 0
    assert len(TextCache(tmp_path, "weights", 16)) == 9


def test_captions_that_a_crash_damaged(tmp_path):
    batch = trainees.rows("depth", 3)
    embeddings = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    cache = TextCache(tmp_path, "weights", 16)
    cache.write(batch.input_ids, embeddings)
    content = bytearray(cache.path.read_bytes())
    content[16 + 4 : 16 + 64] = bytes(60)  # of the first embedding
    cache.path.write_bytes(content[:-5])  # and the last is cut short
    cache = TextCache(tmp_path, "weights", 16)
    out = torch.zeros(3, 16)
    assert cache.read(batch.input_ids, out).tolist() == [0, 2]
    assert torch.equal(out[1], embeddings[1])
    cache.write(batch.input_ids[2:], embeddings[2:], together=3)
    cache = TextCache(tmp_path, "weights", 16)
    assert cache.read(batch.input_ids, out).tolist() == [0]
    assert torch.equal(out[2], embeddings[2])
    assert cache.read(batch.input_ids, out, together=4).tolist() == [0, 1, 2]  # other products, other rounding


def test_the_optimizers_groups():
    plan = trainees.plan(lora_r=4, coef_lr=1e-3, weight_decay=0.2)
    model = trainees.trainee(plan)
    found = {name: group for group in groups(model, plan) for name in group["names"]}
    assert found.keys() == trained(model).keys()
    adapter = next(name for name in found if ".lora_A" in name)
    assert (found[adapter]["share"], found[adapter]["weight_decay"]) == (1.0, 0.2)
    for name in ("logit_scale", "vision_model.embeddings.class_embedding", "vision_model.post_layernorm.weight"):
        assert (found[name]["share"], found[name]["weight_decay"]) == (1e-3, 0.0)
    assert found["visual_projection.weight"]["weight_decay"] == 0.2


def test_a_scaler_scales_the_gradients():
    plan = trainees.plan()
    model, batch = trainees.trainee(plan), trainees.rows("depth", 5)
    _, wanted = gradients(LargeBatchStep(Towers(model), 2), batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, found = gradients(LargeBatchStep(Towers(model), 2, scaler=scaler), batch)
    assert trainees.worst({name: x / 1024 for name, x in found.items()}, wanted)[0] <= BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_follows_float32(dtype):
    """The gradients of 16-bit towers are no further from float32's than rounding takes them, and no weight changes."""
    plan = trainees.plan(lora_r=0)
    model, batch = trainees.trainee(plan), trainees.rows("depth", 6)
    _, wanted = gradients(LargeBatchStep(Towers(model), 6), batch)
    _, whole = gradients(LargeBatchStep(Towers(model), 6, autocast=dtype), batch)
    _, pieces = gradients(LargeBatchStep(Towers(model), 2, autocast=dtype), batch)
    norm = sum(x.norm() ** 2 for x in wanted.values()) ** 0.5

    def error(found):
        return (sum((found[name] - wanted[name]).norm() ** 2 for name in wanted) ** 0.5 / norm).item()

    assert 0 < error(whole) < 0.3
    assert error(pieces) < 2 * error(whole) + torch.finfo(dtype).eps
    assert {x.dtype for x in pieces.values()} == {torch.float32}


def test_rows_that_do_not_match():
    model, batch = trainees.trainee(trainees.plan()), trainees.rows("depth", 4)
    batch.input_ids = batch.input_ids[:3]
    with pytest.raises(ValueError, match="as many captions as pixels, got 3"):
        LargeBatchStep(Towers(model), 2)(batch, 0)
    with pytest.raises(ValueError, match="micro_batch"):
        LargeBatchStep(Towers(model), 0)


def test_an_empty_batch_gives_no_gradient():
    model = trainees.trainee(trainees.plan())
    result = LargeBatchStep(Towers(model), 2)(trainees.rows("depth", 0), 0)
    assert result.rows == 0 and all(parameter.grad is None for parameter in model.parameters())


SIZES = {2: [(4, 3), (7, 0)], 3: [(3, 1, 3), (0, 5, 2)]}


def equals_one_process(rank, group, engine, sizes, lora, text, micro_batches=(1, 2, 7)):
    plan = trainees.plan(lora_r=lora, train_text=text, lock_image=False, patch_dropout=0.5)
    batch = trainees.rows("depth", sum(sizes))
    _, wanted = trainees.dense(trainees.trainee(plan), batch, plan)
    model = trainees.trainee(plan)
    start = sum(sizes[:rank])
    mine = trainees.part(batch, start, start + sizes[rank])
    place = Place(rank, len(sizes), CPU, group)
    wrapped = wrap(Towers(model), engine, place)
    for micro_batch in micro_batches:
        for _ in range(2):  # the engine's state after one step is good for another
            result, found = gradients(LargeBatchStep(wrapped, micro_batch, group=group), mine)
        assert result.rows == sum(sizes)
        error, name = trainees.worst(found, wanted)
        assert error <= BOUND, f"{name}: {error:.1e}; {engine}, rank {rank} of {sizes}, {micro_batch}, {lora}, {text}"


def trains_as_one_process(place, engine, out):
    """A run of two processes, in two parts, ends where one of one process does."""
    plan = trainees.plan(lora_r=4, patch_dropout=0.5, clip_norm=0.5, lr=1e-3, epochs=2)
    data = trainees.Data(samples=12, rank=place.rank, world=2)
    for steps in (2, None):
        summary = train(plan, trainees.trainee(plan), data, out, engine=engine, place=place, steps=steps)
    if place.first:
        alone = Place(0, 1, CPU, None)
        train(plan, trainees.trainee(plan), trainees.Data(samples=12), out / "one", place=alone)
        exported = trainees.weights(model_dict["depth"].from_pretrained(summary.model, merge_lora=False))
        weights = load(summary.checkpoint)[0]
        assert trainees.same({name: exported[name] for name in weights}, weights)
        assert (out / "adapter" / "adapter_model.safetensors").is_file()
        ends = [load(folder / "checkpoints" / "step-00000004") for folder in (out, out / "one")]
        start = trainees.weights(trainees.trainee(plan))
        for name, value in ends[1][0].items():
            if not name.endswith("k_proj.bias"):  # has no gradient but rounding, which AdamW makes as large as any
                assert (ends[0][0][name] - value).norm() <= 1e-2 * (value - start[name]).norm(), f"{engine}: {name}"
        moments = [end[1]["optimizer"]["visual_projection.weight"]["exp_avg"] for end in ends]
        assert (moments[0] - moments[1]).norm() <= 1e-3 * moments[1].norm()


def every_check(rank, folder):
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3, timeout=patience)
    for world, every in SIZES.items():
        group = dist.new_group(list(range(world)), timeout=patience)
        if rank >= world:
            continue
        for sizes in every:
            equals_one_process(rank, group, "ddp", sizes, 4, text=False)
            equals_one_process(rank, group, "ddp", sizes, 0, text=False, micro_batches=(2,))
            equals_one_process(rank, group, "ddp", sizes, 0, text=True, micro_batches=(2,))
        if world == 2:
            equals_one_process(rank, group, "fsdp", (7, 0), 0, text=False, micro_batches=(2,))
            equals_one_process(rank, group, "fsdp", (4, 3), 4, text=True, micro_batches=(2,))
            trains_as_one_process(Place(rank, 2, CPU, group), "fsdp", Path(folder) / "fsdp")
    dist.barrier()
    dist.destroy_process_group()


def test_processes_equal_one(tmp_path):
    multiprocessing.set_forkserver_preload([__name__])  # the imports are done once
    mp.start_processes(every_check, (str(tmp_path),), nprocs=3, start_method="forkserver")
