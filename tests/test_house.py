"""The layout: an op's five files, who imports whom, no package of the name `kernels`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from bench import resources

ROOT = Path(__file__).resolve().parent.parent
MEMBERS = ("lbfast/ops/{}.py", "lbfast/reference/{}.py", "kernels/{}.py", "tests/test_{}.py", "bench/bench_{}.py")
SHARED_KERNELS = ("lbfast.kernels.primitives", "lbfast.kernels.configs", "lbfast.kernels.pairs")

# Imports run downwards: from a module to modules of its own height or below. What is not named is an application.
HEIGHTS = {
    "lbfast.files": 0,
    "lbfast.messages": 0,
    "lbfast.paths": 0,
    "lbfast.signals": 0,
    "lbfast.native": 0,
    "lbfast.profiling.count": 1,  # it counts whatever it is given
    "lbfast.dispatch": 1,
    "lbfast.float8": 1,
    "lbfast.products": 1,
    "lbfast.tokenwise": 1,
    "lbfast.distributed": 1,
    "lbfast.ops": 2,
    "lbfast.losses": 3,
    "lbfast.model": 3,
    "lbfast.processing": 3,
    "lbfast.checkpoints": 4,
    "lbfast.data": 4,
    "lbfast.embeds": 4,
    "lbfast.embedding": 5,
    "lbfast.evaluation": 5,
    "lbfast.training": 5,
}
APPLICATION = 6
SIDE_BY_SIDE = ("lbfast.embedding", "lbfast.evaluation", "lbfast.training")
MAY = {("lbfast.training", "lbfast.evaluation")}  # for train --eval
APART = ("lbfast.reference", "lbfast.testing")  # for tests and benches


def within(name, *prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def height(name):
    if name == "lbfast":
        return 0  # lazy names and a version
    return next((h for prefix, h in HEIGHTS.items() if within(name, prefix)), APPLICATION)


def sources():
    """(module, file) of all that is shipped; the kernels lie in a folder of their own."""
    for path in sorted((ROOT / "lbfast").rglob("*.py")):
        if not path.is_relative_to(ROOT / "lbfast" / "kernels"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield f"lbfast.kernels.{path.stem}", path


def is_module(name):
    path = ROOT / Path(*name.replace("lbfast.kernels", "kernels").split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(path):
    """(module, line, whether inside a function) of every import in a file, those for type checkers left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    lazy = {id(n) for function in ast.walk(tree) if isinstance(function, kinds) for n in ast.walk(function)}
    checking = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    typing_only = {id(n) for block in checking for n in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in typing_only or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            joined = [f"{node.module}.{alias.name}" for alias in node.names]
            own = [f"{node.module}.{alias.name}" for alias in node.names if alias.name.startswith("_")]
            names = [name if is_module(name) or name in own else node.module for name in joined]
        for name in names:
            yield name, node.lineno, id(node) in lazy


def room(module):
    """The package a module lies in, of those directly below lbfast; of the ground floor, itself."""
    return ".".join(module.split(".")[:2])


def private(module, name):
    """Whether `name`, a module or module.attribute, is another room's own: it has a part that begins with _."""
    return room(module) != room(name) and any(
        part.startswith("_") and part != "__main__" for part in name.split(".")[1:]
    )


def breach(module, name, in_function):
    """Why `module` may not import `name`, or an empty string."""
    if within(name, "triton") and not within(module, "lbfast.kernels") and not in_function:
        return "Triton is for functions only"
    if within(name, "lbfast.bench"):
        return "" if module == "lbfast.cli.bench" and in_function else "benches are for `lbfast bench` alone"
    if within(name, "tests", "bench"):
        return "the product knows neither tests nor benches"
    if not within(name, "lbfast"):
        return ""
    if private(module, name):
        return "a private door"
    if not is_module(name) and "._" in name:
        name = name[: name.rindex("._")]  # a name of its own room's module
    if within(module, "lbfast.kernels"):
        op, other = (resources.op_of(each.removeprefix("lbfast.kernels.")) for each in (module, name))
        mine = op == other  # a long file's other parts
        return "" if mine or name in SHARED_KERNELS or name == "lbfast.kernels" else "a kernel stands alone"
    if within(module, "lbfast.reference"):
        return "" if within(name, "lbfast.reference") else "the reference stands apart"
    if within(module, "lbfast.testing"):
        return "" if height(name) < APPLICATION else "testing is below what it tests"
    if within(name, *APART):
        return "the product never imports it"
    if within(name, "lbfast.kernels"):
        return "" if within(module, "lbfast.ops") and in_function else "kernels are for functions of ops"
    rooms = tuple(next((room for room in SIDE_BY_SIDE if within(each, room)), "") for each in (module, name))
    if all(rooms) and rooms[0] != rooms[1] and rooms not in MAY:
        return "they stand side by side"
    return "" if height(name) <= height(module) else "imports run downwards"


def test_imports_run_downwards():
    breaches = [
        f"{path.relative_to(ROOT)}:{line}: {module} imports {name}: {why}"
        for module, path in sources()
        for name, line, in_function in imports(path)
        if (why := breach(module, name, in_function))
    ]
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize(
    "module, name, in_function",
    [
        ("lbfast.ops.mlp", "lbfast.kernels.mlp", False),
        ("lbfast.ops.mlp", "lbfast.model.layers", True),
        ("lbfast.ops.mlp", "lbfast.reference.mlp", True),
        ("lbfast.model.layers", "lbfast.kernels.mlp", True),
        ("lbfast.model.layers", "lbfast.cli", True),
        ("lbfast.kernels.mlp", "lbfast.kernels.layer_norm", False),
        ("lbfast.kernels.mlp", "lbfast.ops.mlp", True),
        ("lbfast.dispatch", "lbfast.ops", True),
        ("lbfast.dispatch", "triton", False),
        ("lbfast.cli", "bench.resources", True),
        ("lbfast.cli.bench", "lbfast.bench.harness", False),
        ("lbfast.embedding", "lbfast.bench.harness", True),
        ("lbfast.reference.mlp", "lbfast.ops.mlp", False),
        ("lbfast.evaluation.encoder", "lbfast.training.batches", True),
        ("lbfast.evaluation.encoder", "lbfast.embedding.pipeline", False),
        ("lbfast.training.batches", "lbfast.embedding.items", False),
        ("lbfast.embedding.pipeline", "lbfast.evaluation.encoder", False),
        ("lbfast.data.reader", "lbfast.training.batches", True),
        ("lbfast.processing.video", "lbfast.data.decode", True),
        ("lbfast.training.start", "lbfast.mini", True),
        ("lbfast.model.layers", "lbfast.ops._smoothing", False),
        ("lbfast.model.layers", "lbfast.dispatch._chosen", True),
    ],
)
def test_breaches_are_seen(module, name, in_function):
    assert breach(module, name, in_function)


@pytest.mark.parametrize(
    "module, name",
    [
        ("lbfast.training.trainer", "lbfast.evaluation.encoder"),
        ("lbfast.training.batches", "lbfast.data.reader"),
        ("lbfast.embedding.pipeline", "lbfast"),
        ("lbfast.mini.table", "lbfast.evaluation.encoder"),
        ("lbfast.ops.info_nce", "lbfast.ops._smoothing"),
        ("lbfast.ops.mlp", "lbfast.products"),
    ],
)
def test_what_the_picture_allows(module, name):
    assert not breach(module, name, False)


def test_every_op_has_its_five_files():
    ops = {path.stem for path in (ROOT / "lbfast" / "ops").glob("[a-z]*.py")}
    kernels = {resources.op_of(path.stem) for path in (ROOT / "kernels").glob("*.py")}
    ops |= kernels - {name.split(".")[-1] for name in SHARED_KERNELS}
    missing = [member.format(op) for op in sorted(ops) for member in MEMBERS if not (ROOT / member.format(op)).exists()]
    assert not missing, missing


def test_every_op_is_public():
    import lbfast.ops

    assert sorted(lbfast.ops.__all__) == sorted(p.stem for p in (ROOT / "lbfast" / "ops").glob("[a-z]*.py"))


def test_kernels_are_no_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import lbfast.kernels.mlp as m, pathlib; print(pathlib.Path(m.__file__).parent)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()) == ROOT / "kernels", done.stderr


def test_what_is_named_as_slow_is_there():
    """tests/fixtures.py marks them; a name that is no test's marks nothing."""
    for name in (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").split():
        file, test = name.split("::")
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), name
