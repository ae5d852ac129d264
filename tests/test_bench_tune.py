"""Launch tables: candidates that compute something else are not taken, and what is written reads back."""

from __future__ import annotations

import ast
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from bench import harness, tune
from lbfast.kernels import configs

pytestmark = pytest.mark.any_device
Launch = configs.Launch


def small(**more):
    given = {
        "table": "LAYER_NORM_FWD",
        "grid": {"NUMBERS": (8, 16, 32)},
        "inputs": lambda device: tune._random(device, (5, 48), (48,), (48,)),
        "call": lambda *x: tune.ops.layer_norm(*x, impl="triton"),
        "warps": (4,),
    }
    return tune.Tunable(**{**given, **more})


@pytest.fixture
def on_this_machine(monkeypatch):
    """Whatever there is: the interpreter or a GPU."""
    from lbfast.kernels.primitives import arch

    device = harness.device()
    if device == "cuda":

        def random(device, *sizes):
            return [torch.randn(size, device=device, requires_grad=True) for size in sizes]

        monkeypatch.setattr(tune, "_random", random)
    return arch(torch.device(device)), device


def times(table, key, by_elements):
    """A clock that reads the row in use."""

    def clock(step):
        step()
        row = table.get(key) or table["default"]
        return by_elements.get(row.tile["NUMBERS"], 1.0)

    return clock


@pytest.mark.parametrize("backward", [False, True])
def test_takes_the_fastest(on_this_machine, backward):
    arch, device = on_this_machine
    name = "LAYER_NORM_BWD" if backward else "LAYER_NORM_FWD"
    table = getattr(configs, name)
    grid = {"NUMBERS": (8, 16, 32), **({"PER_SM": (2,)} if backward else {})}
    before = dict(table)
    clock = times(table, arch, {8: 0.7, 16: 0.5, 32: 0.6})
    found = tune.tune(small(table=name, grid=grid, backward=backward), arch, device, clock)
    assert found.best.tile["NUMBERS"] == 16 and (found.before, found.after) == (1.0, 0.5)
    assert table == before  # nothing is left behind


def test_a_little_faster_is_not_enough(on_this_machine):
    arch, device = on_this_machine
    clock = times(configs.LAYER_NORM_FWD, arch, {8: 0.99})
    found = tune.tune(small(), arch, device, clock)
    assert found.best is found.present and not found.rejected


def test_what_computes_something_else_is_not_timed(on_this_machine):
    arch, device = on_this_machine
    timed = []

    def call(x, weight, bias):
        row = configs.LAYER_NORM_FWD.get(arch, configs.LAYER_NORM_FWD["default"])
        if row.tile["NUMBERS"] == 16:
            raise RuntimeError("out of resources: shared memory")
        return x * (2 if row.tile["NUMBERS"] == 8 else 1)

    def clock(step):
        timed.append(configs.LAYER_NORM_FWD.get(arch, configs.LAYER_NORM_FWD["default"]).tile["NUMBERS"])
        return 1.0 / len(timed)

    found = tune.tune(small(call=call), arch, device, clock)
    assert timed[1:] == [32] and found.best.tile["NUMBERS"] == 32
    wrong, failed = found.rejected
    assert "from the present row" in wrong and "out of resources" in failed


def test_writes_a_table_that_reads_back(on_this_machine, tmp_path, monkeypatch):
    arch, device = on_this_machine
    path = tmp_path / "configs.py"
    path.write_text(tune.CONFIGS.read_text())
    clock = times(configs.LAYER_NORM_FWD, arch, {32: 0.1})
    broken = small(table="MLP_FWD", call=lambda *x: 1 / 0)
    record = harness.Record("Launch tables", device, tmp_path / "tune.json")
    tune.run([small(), broken], arch, device, clock, record, path)
    assert f'"{arch}": Launch({{"NUMBERS": 32}}, num_warps=4),' in path.read_text()
    assert record.rows[1]["name"] == "MLP_FWD" and "division by zero" in record.rows[1]["note"]
    at_home = tmp_path / "home.py"
    at_home.write_text(tune.CONFIGS.read_text())
    monkeypatch.setattr(tune, "CONFIGS", at_home)  # the same, from the result
    assert tune.main(["--take", str(record.out)]) == 0 and at_home.read_text() == path.read_text()
    found: dict = {}
    exec(compile(path.read_text(), "configs", "exec"), {"__name__": "lbfast.kernels.configs"}, found)
    assert found["LAYER_NORM_FWD"][arch].tile == {"NUMBERS": 32}
    for name, table in vars(configs).items():
        if name.isupper() and name != "LAYER_NORM_FWD":
            assert repr(found[name]) == repr(table)


def test_rows_of_a_new_architecture():
    changes = {
        "ATTENTION_FWD": {"sm_90": Launch({"ROWS": 64, "COLS": 64}, 4, 4)},
        "MLP_FWD": {"sm_130": Launch({"BLOCK": 2048}, 8)},
    }
    source = tune.written(tune.CONFIGS.read_text(), changes)
    assert '    "sm_90": Launch({"ROWS": 64, "COLS": 64}, num_warps=4, num_stages=4),' in source
    assert '    "sm_130": Launch({"BLOCK": 2048}, num_warps=8),' in source
    ast.parse(source)
    assert tune.written(tune.CONFIGS.read_text(), {}) == tune.CONFIGS.read_text()


def test_every_table_of_an_architecture_is_tuned():
    tables = {name for name, value in vars(configs).items() if name.isupper() and isinstance(value, dict)}
    shared = {"PATCH_EMBED_MATRIX", "ATTENTION_BWD_WHOLE"}  # no sizes; chosen by size
    assert {tunable.table for tunable in tune.TUNABLES} == tables - shared
    for tunable in tune.TUNABLES:
        table = getattr(configs, tunable.table)
        assert set(tunable.grid) == set(table.get("sm_90", table["default"]).tile), tunable.table
        assert 1 < len(tunable.candidates("unknown")) <= tune.MOST < 2 * len(tunable.candidates("unknown")) + 8


def test_rows_as_planned(monkeypatch, tmp_path):
    """What compiles to something else, fits, and is counted to take least."""
    from bench import resources

    tunable = small(grid={"NUMBERS": (16, 32, 64, 128)}, warps=(4,))
    compiled = []

    def compile_case(kernel, index, arch):
        case = resources.cases(kernel, arch)[index]
        numbers = configs.LAYER_NORM_FWD["sm_90"].tile["NUMBERS"]
        compiled.append((case.kernel.__name__, numbers))
        return SimpleNamespace(fits=numbers != 32, issue_us=float(numbers % 120))

    monkeypatch.setattr(resources, "compile_case", compile_case)
    rows = tunable.every()
    prices = [tune._cost("LAYER_NORM_FWD", "sm_90", row, "sm_90") for row in rows]
    present = configs.LAYER_NORM_FWD["default"].tile["NUMBERS"]
    assert {name for name, _ in compiled} == {"_layer_norm_fwd_kernel"} and "sm_90" not in configs.LAYER_NORM_FWD
    assert prices[1] is None and prices[[16, 32, 64, 128].index(present)] is None  # spills; changes nothing
    assert 0 < prices[3] < prices[0]
    monkeypatch.setattr(tune, "PLAN", tmp_path / "tune.json")
    known = {"sm_90": {"LAYER_NORM_FWD": [dataclasses.asdict(row) for row in rows[3:]], "MLP_FWD": []}}
    tune.PLAN.write_text(tune._lines({**known, "sm_100": {}}))
    assert json.loads(tune.PLAN.read_text()) == {**known, "sm_100": {}}
    assert tunable.candidates("sm_90") == [rows[3]] and len(tunable.candidates("sm_80")) == 4


def test_the_plan_is_of_todays_tables():
    if not tune.PLAN.exists():
        pytest.skip("no rows are planned")
    by_name = {tunable.name: tunable for tunable in tune.TUNABLES}
    for arch, tables in json.loads(tune.PLAN.read_text()).items():
        assert tables.keys() <= by_name.keys(), arch
        for name, rows in tables.items():
            assert len(rows) <= tune.MOST
            assert all(set(row["tile"]) == set(by_name[name].grid) for row in rows), (arch, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU says")
def test_needs_a_gpu(capsys):
    assert tune.main([]) == 1
    assert "launch tables are tuned on a GPU" in capsys.readouterr().err
