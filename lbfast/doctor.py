"""`lbfast doctor`: what is installed, what devices there are, and which implementation each op takes where, and why."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

import lbfast
from lbfast import dispatch, native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_PACKAGES = {  # distribution: (module, what it is for)
    "torch": ("torch", "everything"),
    "triton": ("triton", "the GPU kernels"),
    "transformers": ("transformers", "the models"),
    "tokenizers": ("tokenizers", "captions"),
    "safetensors": ("safetensors", "checkpoints"),
    "huggingface-hub": ("huggingface_hub", "downloads"),
    "numpy": ("numpy", "everything"),
    "pillow": ("PIL", "pictures"),
    "av": ("av", "video and audio files"),
    "pyarrow": ("pyarrow", "lbfast embed"),
    "flash-attn": ("flash_attn", "attention by impl='flash_attn'"),
    "xformers": ("xformers", "attention by impl='xformers'"),
}
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_VARIABLES = ("LBFAST_IMPL", "LBFAST_CACHE", "TRITON_INTERPRET", "CXX", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")

Sample = Callable[..., tuple[Any, ...]]


def _tokens(new: Any) -> tuple[Any, ...]:
    return new(1, 257, 1024), new(1024), new(1024), None


def _mlp(new: Any) -> tuple[Any, ...]:
    return new(1, 257, 1024), new(4096, 1024), new(4096), new(1024, 4096), new(1024)


def _captions(new: Any) -> tuple[Any, ...]:
    q = new(1, 77, 12, 64)
    return q, q, q, True, torch.zeros(1, 77, dtype=torch.bool, device=q.device)


SAMPLES: dict[str, tuple[str, Sample]] = {
    "attention": ("attention", lambda new: (*[new(1, 257, 16, 64)] * 3, False, None)),
    "attention, captions": ("attention", _captions),
    "temporal_attention": ("temporal_attention", lambda new: (*[new(1, 8, 257, 16, 64)] * 3,)),
    "layer_norm": ("layer_norm", _tokens),
    "mlp": ("mlp", _mlp),
    "patch_embed": ("patch_embed", lambda new: (new(1, 3, 224, 224), new(1024, 3, 14, 14), None)),
    "info_nce": ("info_nce", lambda new: (*[new(64, 768)] * 2,)),
    "sigmoid_loss": ("sigmoid_loss", lambda new: (*[new(64, 768)] * 2,)),
}
"""Label -> (op, its inputs in a LanguageBind L/14 as its why_not takes them, made by `new(*shape)`)."""


@dataclass(frozen=True)
class Choice:
    """What an op does on a device.

    Attributes:
        label: key of SAMPLES.
        device: "cpu" or "cuda:N".
        chosen: dtype -> implementation, or why there is none.
        against: implementation not chosen -> reason -> dtypes.
    """

    label: str
    device: str
    chosen: dict[torch.dtype, str]
    against: dict[str, dict[str, list[torch.dtype]]]


def choices(device: str) -> Iterator[Choice]:
    """Asks every op what it would do with its samples. A why_not that fails is reported, not raised."""
    for label, (op, sample) in SAMPLES.items():
        chosen: dict[torch.dtype, str] = {}
        against: dict[str, dict[str, list[torch.dtype]]] = {}
        for dtype in DTYPES:
            try:
                module = importlib.import_module(f"lbfast.ops.{op}")
                inputs = sample(lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device=device))
                implementations = module.in_order(*inputs) if hasattr(module, "in_order") else module.IMPLEMENTATIONS
                reasons = dispatch.explain(implementations, *inputs)
            except Exception as error:  # the doctor examines broken installations
                chosen[dtype] = f"cannot tell: {error}"
                continue
            try:
                chosen[dtype] = dispatch.choose(op, None, implementations, *inputs)
            except RuntimeError:
                chosen[dtype] = "none"
            before = True  # implementations are in order of preference
            for name, why in reasons.items():
                before = before and name != chosen[dtype]
                if name == chosen[dtype]:
                    continue
                for reason in why or [_why_passed_over(name, before)]:
                    against.setdefault(name, {}).setdefault(reason, []).append(dtype)
        yield Choice(label, device, chosen, against)


def _why_passed_over(name: str, before: bool) -> str:
    if not before:
        return "could, and comes after"
    if name == "triton" and dispatch.triton_interpreted():
        return "only by name: TRITON_INTERPRET=1 runs it slowly on the CPU"
    return "could; LBFAST_IMPL or use_impl asks for another"


def examine(console: Console, why: bool = False) -> None:
    """Prints everything; `why`: with the reasons against what an op does not take. What cannot be found out shows its
    reason."""
    console.print(_versions())
    console.print(_devices())
    with console.status("building the native kernels, once for each version") if console.is_terminal else _nothing():
        reason = _native()
    console.print(_native_table(reason))
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    found = [choice for device in devices for choice in choices(device)]
    console.print(_ops(found))
    if why:
        for choice in found:
            console.print(f"[bold]{choice.label}, {choice.device}[/]")
            for line in _reasons(choice):
                console.print(Padding(escape(line), (0, 0, 0, 2)))
    else:
        console.print("Why not the others: lbfast doctor --why")


def _nothing() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _versions() -> Table:
    table = Table("package", "version", title="Versions", title_justify="left")
    table.add_row("lbfast", lbfast.__version__)
    table.add_row("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    for name, (module, without) in _PACKAGES.items():
        table.add_row(name, escape(version(name, module, without)))
    return table


def version(name: str, module: str, without: str) -> str:
    """The version of a distribution whose module can be imported, else what is wrong with it."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed; it is for {without}"
    try:
        return str(getattr(importlib.import_module(module), "__version__", found))  # torch's names its build too
    except Exception as error:  # broken installations fail in many ways
        return f"{found}, but cannot be imported: {type(error).__name__}: {error}"


def _devices() -> Table:
    table = Table("device", "what it is", title="Devices", title_justify="left")
    flags, name = set(_cpu_fields().get("flags", "").split()), cpu_name()
    wide = ", ".join(f"{flag} {'yes' if flag in flags else 'no'}" for flag in _FLAGS)
    capability = torch.backends.cpu.get_cpu_capability()
    threads = f"cores: {os.cpu_count()}, torch's threads: {torch.get_num_threads()}, which use {capability}"
    table.add_row("cpu", escape(f"{name}; {threads}; {wide}"))
    if torch.cuda.device_count() == 0:
        built = torch.version.cuda or torch.version.hip
        reason = f"torch is built for {built}, and finds no device or driver" if built else "torch is a CPU build"
        table.add_row("cuda", f"none: {reason}")
    for i in range(torch.cuda.device_count()):
        table.add_row(f"cuda:{i}", escape(_gpu(i)))
    for variable in _VARIABLES:
        if variable in os.environ:
            table.add_row(variable, escape(os.environ[variable]))
    return table


def _gpu(index: int) -> str:
    try:
        found = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError) as error:
        return f"cannot be used: {error}"
    return (
        f"{found.name}; compute capability {found.major}.{found.minor}; {found.total_memory / 2**30:.0f} GiB; "
        f"{found.multi_processor_count} multiprocessors; CUDA {torch.version.cuda}"
    )


def _cpu_fields() -> dict[str, str]:
    """What the system says of the first CPU; nothing where it keeps no such file."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields


def cpu_name() -> str:
    """The CPU's name, as far as the system tells it; of AMD's with the generation, which the name may not say."""
    fields = _cpu_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    zen = {"25": "Zen 4" if "avx512f" in fields.get("flags", "").split() else "Zen 3", "26": "Zen 5"}
    generation = zen.get(fields.get("cpu family", "")) if fields.get("vendor_id") == "AuthenticAMD" else None
    return f"{name}, {generation}" if generation else name


def _native() -> str:
    try:
        return "; ".join(native.why_not())
    except Exception as error:  # a compiler or linker that fails in a way of its own
        return f"{type(error).__name__}: {error}"


def _native_table(reason: str) -> Table:
    table = Table("native kernels", "", title="Native CPU kernels", title_justify="left")
    table.add_row("state", escape(f"not available: {reason}" if reason else "built and loaded"))
    with contextlib.suppress(Exception):  # without sources or a home folder there is no name to show
        table.add_row("library", native.library_name())
    table.add_row("cache folder", escape(str(native.cache_folder())))
    return table


def _ops(found: list[Choice]) -> Table:
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    table = Table("op", "device", *names, title="Implementations", title_justify="left")
    for number, choice in enumerate(found):
        last = number + 1 == len(found) or found[number + 1].device != choice.device
        taken = [escape(choice.chosen[dtype]) for dtype in DTYPES]
        table.add_row(choice.label, choice.device, *taken, end_section=last)
    return table


def _reasons(choice: Choice) -> list[str]:
    """What speaks against each implementation that is not taken, a line each."""
    lines = []
    for name, reasons in choice.against.items():
        for reason, dtypes in reasons.items():
            only = (
                "" if len(dtypes) == len(DTYPES) else f" ({', '.join(str(d).removeprefix('torch.') for d in dtypes)})"
            )
            lines.append(f"{name}{only}: {reason}")
    return lines
