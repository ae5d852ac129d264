"""`lbfast profile`: a trace, operators beside the roofline, memory, energy; and what `lbfast bench` hands over."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from lbfast.cli import app
from lbfast.cli.bench import BENCHES
from lbfast.model.config import MODALITIES
from lbfast.profiling import machine, plot, power, subjects, trace
from lbfast.profiling.count import Counter, Work
from lbfast.reference import languagebind as reference
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _rates(monkeypatch):
    monkeypatch.setattr(machine, "rates", lambda device, dtype: machine.Rates(1e11, 1e10))
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def invoke(*arguments: object):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])


def counted(call):
    with Counter() as counter:
        call()
    return counter.work


@pytest.mark.parametrize("name", MODALITIES)
def test_counts_the_flop_of_the_reference(name):
    """Forward: what the eager baseline needs, less the last layer's patches; both towers, drop-in and optimized."""
    model = tiny.model(name).requires_grad_(False)
    given = subjects.inputs(model, 2, CPU)
    eager = reference.like(model)
    with FlopCounterMode(display=False) as theirs:
        eager.vision_model(given["pixel_values"])
    ours = counted(lambda: model.vision_model(given["pixel_values"]))
    assert sum(work.flops for work in ours.values()) == pytest.approx(theirs.get_total_flops(), rel=0.02)
    call, _ = subjects.subject(model, name, "inference", 2, CPU, torch.float32)
    pooled = sum(work.flops for work in counted(call).values())
    assert 0.5 * theirs.get_total_flops() < pooled < theirs.get_total_flops()


def test_counts_a_product_into_a_sum():
    total, a, b = torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(4, 5)
    work = counted(lambda: total.addmm_(a, b))
    assert work["aten::addmm_"].flops == 2 * 3 * 4 * 5


def test_counts_the_flop_of_a_backward():
    """Three products where the forward has one: of the layers, in a training step."""
    model = tiny.model("video")
    step, dtype = subjects.subject(model, "video", "train", 2, CPU, None)
    given = subjects.inputs(model, 2, CPU)
    assert dtype == torch.float32
    eager = reference.like(model).train()
    with FlopCounterMode(display=False) as theirs:
        eager(**given)["loss"].backward()
    work = counted(step)
    assert sum(done.flops for done in work.values()) == pytest.approx(theirs.get_total_flops(), rel=0.25)
    assert {"lbfast::mlp_bwd", "lbfast::layer_norm_bwd"} <= work.keys()


def test_counts_bytes_once_and_no_views():
    x = torch.zeros(10, 4)
    work = counted(lambda: (x + x.t().t())[2:])
    assert work.keys() == {"aten::add"} and work["aten::add"].calls == 1
    assert work["aten::add"].bytes == 3 * 160


def test_operators_join_time_and_work():
    rates = machine.Rates(flops=1e9, bytes=1e9)
    spent = {"aten::mm": (2, 4.0), "aten::view": (5, 0.5), "aten::idle": (1, 0.0)}
    found = trace.operators(spent, {"aten::mm": Work(2, 2e6, 1e6)}, rates)
    assert [op.name for op in found] == ["aten::mm", "aten::view"]
    assert found[0].roofline == 0.5 and found[0].intensity == 2 and found[1].roofline == 0


def test_kernels_that_no_operator_launched(tmp_path):
    """As Triton's launcher does in inference: they have rows of their own, by name."""

    def kernel(name, ms, of=None):
        return {"cat": "kernel", "name": name, "dur": 1e3 * ms, "args": {} if of is None else {"External id": of}}

    events = [
        {"cat": "cpu_op", "name": "aten::addmm", "args": {"External id": 7}},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "args": {"correlation": 9}},
        {"name": "a comment"},
        kernel("gemm", 4, of=7),
        kernel("_norm", 1),
        kernel("_norm", 2),
        kernel("_gelu", 5, of=8),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    assert trace.alone(path) == {"_norm": (2, 3.0), "_gelu": (1, 5.0)}


def test_times_of_a_gpu():
    """Kernels count for the operator that launched them: with all inside where it was counted, else its own."""

    def event(name, own, children=(), parent=None, device=trace.DeviceType.CPU):
        total = own + sum(child.device_time_total for child in children)
        times = {"self_device_time_total": own, "device_time_total": total, "self_cpu_time_total": 1e6}
        return SimpleNamespace(name=name, cpu_parent=parent, cpu_children=list(children), device_type=device, **times)

    product = event("aten::mm", 500)
    ours = event("lbfast::mlp", 250, [product])
    outer = event("aten::linear", 0, [event("aten::addmm", 2000)])
    kernel = event("sm90_gemm", 1e9, device=trace.DeviceType.CUDA)
    launch = event("cuLaunchKernelEx", 300)  # of no operator: `alone` has its kernel
    found = trace._by_name([ours, outer, kernel, launch], "cuda", {"lbfast::mlp", "aten::addmm"})
    assert found == {"lbfast::mlp": (1, 0.75), "aten::linear": (1, 0.0), "aten::addmm": (1, 2.0)}


@pytest.mark.parametrize("mode", subjects.MODES)
def test_profile_of_a_checkpoint(mode, tmp_path):
    where, out = tiny.checkpoint(tmp_path, "video"), tmp_path / "out"
    options = ("--seconds", 0, "--batch", 2, "--mode", mode, "--device", "cpu", "--dtype", "float32")
    result = invoke("profile", "--model", where, "--out", out, *options)
    assert result.exit_code == 0, result.output
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert any(e.get("name", "").startswith("lbfast::") and e["ph"] == "X" and e["dur"] >= 0 for e in events)
    profile = json.loads((out / "profile.json").read_text())
    assert profile["items"] == 2 and profile["ms"] > 0 and profile["energy"] == {} and profile["header"]["mode"] == mode
    assert max(mib for _, mib in profile["memory"]) > 0
    names = {op["name"] for op in profile["operators"]}
    assert names & ({"lbfast::mlp_bwd"} if mode == "train" else {"lbfast::patch_embed", "lbfast::tokenwise_embed"})
    assert "roofline" in result.stdout and "of the measured matmul rate" in result.stdout
    assert "ui.perfetto.dev" in result.stdout
    if importlib.util.find_spec("matplotlib"):
        assert (out / "roofline.png").read_bytes()[:4] == b"\x89PNG" == (out / "memory.png").read_bytes()[:4]


def test_profile_of_an_architecture(tmp_path, monkeypatch):
    made = []

    def random_model(arch, name, layers, lora):
        made.append((arch, name, layers, lora))
        return tiny.model("image")

    monkeypatch.setattr(subjects, "random_model", random_model)
    monkeypatch.setattr(plot, "why_not", lambda: "matplotlib is not installed")
    arguments = ("--arch", "H/14", "--modality", "language", "--layers", 3, "--seconds", 0, "--out", tmp_path)
    result = invoke("profile", *arguments, "--device", "cpu")
    assert result.exit_code == 0 and made == [("H/14", "language", 3, 0)], result.output
    assert "no plots: matplotlib is not installed" in result.stderr and not list(tmp_path.glob("*.png"))


def test_random_models():
    model = subjects.random_model("L/14", "audio", layers=1, lora=2)
    assert len(model.vision_model.encoder.layers) == len(model.text_model.encoder.layers) == 1
    assert any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="arch: expected one of L/14, H/14"):
        subjects.random_model("B/32", "audio")
    with pytest.raises(ValueError, match="modality: expected one of"):
        subjects.random_model("L/14", "smell")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "expected either --model or --arch"),
        (("--arch", "L/14", "--model", "x"), "expected either --model or --arch"),
        (("--model", "image", "--layers", 2), "--layers, --lora: expected with --arch"),
        (("--model", "image", "--modality", "video"), "--modality: expected image"),
        (("--model", "nowhere/at/all"), "nowhere"),
    ],
)
def test_errors(arguments, message, tmp_path):
    where = tiny.checkpoint(tmp_path, "image")
    arguments = [where if a == "image" else a for a in arguments]
    result = invoke("profile", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 1 and message in result.stderr and not (tmp_path / "out").exists()


class FakeNvml:
    """pynvml's calls, on a GPU that draws 300 W."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = "sm", "mem", 0

    class NVMLError(Exception):
        pass

    def __init__(self, counter=True, devices=1):
        self.counter, self.devices, self.start = counter, devices, time.perf_counter()

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= self.devices:
            raise self.NVMLError("Invalid Argument")
        return "gpu"

    def nvmlSystemGetDriverVersion(self):
        return b"580.1"

    def nvmlDeviceGetMaxClockInfo(self, handle, clock):
        return {"sm": 1980, "mem": 3201}[clock]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 300_000

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return {"sm": 1700, "mem": 3201}[clock]

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 55

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=2**30)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counter:
            raise self.NVMLError("Not Supported")
        return (time.perf_counter() - self.start) * 250_000


@pytest.mark.parametrize("counter", [True, False])
def test_energy(counter, monkeypatch):
    """By the GPU's counter (250 W), or by its power (300 W), over 0.2 s."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(counter))
    with power.sampling(interval_s=0.01) as samples:
        time.sleep(0.2)
    found = samples.summary()
    assert found["watts"] == 300 and found["sm_mhz"] == 1700 and found["celsius"] == 55 and found["used_mib"] == 1024
    assert found["joules"] == pytest.approx(50 if counter else 60, rel=0.4)
    assert len(samples.taken) > 5
    assert power.driver_and_clocks() == {"driver": "580.1", "max_sm_mhz": 1980, "max_memory_mhz": 3201}


def test_no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert power.why_not() == "nvidia-ml-py is not installed"
    with power.sampling() as samples:
        pass
    assert samples.summary() == {}
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(devices=0))
    assert power.why_not() == "NVML: Invalid Argument"
    monkeypatch.setattr(power.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="570.2, 1980, 3201\n"))
    assert power.driver_and_clocks()["driver"] == "570.2"


def test_energy_of_each_item(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(counter=False))
    ms, energy = trace._timed(lambda: time.sleep(0.05), "cuda", items=4, seconds=0)
    assert ms >= 50 and energy["joules_per_item"] == pytest.approx(300 * 0.05 / 4, rel=0.5)


def test_facts(monkeypatch):
    found = machine.facts("cpu")
    assert {"device", "torch", "threads", "capability", "amx"} <= found.keys()
    monkeypatch.setattr(machine, "facts", lambda device: {"device": "NVIDIA H200 (x)"})
    assert machine.slug("cuda") == "nvidia-h200-x"


def test_rates_are_measured(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(machine, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(machine, "_COPIED", {"cpu": 2**16})
    machine.rates.cache_clear()
    found = machine.rates("cpu", torch.bfloat16)
    machine.rates.cache_clear()
    assert found.flops > 0 and found.bytes > 0
    assert machine.Rates(1e9, 1e9).floor_ms(2e6, 1e6) == 2


def test_rates_where_oneDNN_or_the_machine_is_slow(monkeypatch):
    """oneDNN without products of a dtype, as below AVX512; no larger product than one that takes long."""
    monkeypatch.undo()
    monkeypatch.setattr(machine, "_COPIED", {"cpu": 2**16})
    sides, mm = [], torch.mm

    def slow(a, b, out):
        sides.append(len(a))
        time.sleep(0 if len(a) == 256 else 1.1 * machine._LONG)
        return mm(a, b, out=out)

    def none(*given):
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(torch, "mm", slow)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", none)
    machine.rates.cache_clear()
    found = machine.rates("cpu", torch.bfloat16)
    machine.rates.cache_clear()
    assert set(sides) == {256, 512} and 0 < found.flops < 2 * 512**3 / machine._LONG


def test_bench(monkeypatch):
    given = []
    for name in BENCHES:
        module = SimpleNamespace(main=lambda arguments: given.append(arguments) or 0)
        monkeypatch.setitem(sys.modules, f"lbfast.bench.bench_{name}", module)
    assert invoke("bench", "temporal-attention", "--clips", 2, "--help").exit_code == 0
    assert given == [["--clips", "2", "--help"]]
    assert invoke("bench", "speed").exit_code == 1
    assert "expected one of languagebind" in invoke("bench", "speed").stderr
    assert all(name in invoke("bench", "--help").output for name in BENCHES)
