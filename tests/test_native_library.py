"""The compiled library in its cache: whole or compiled again, whatever a crash or a full disk left there."""

from __future__ import annotations

import time

import pytest

from lbfast import native


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a compiler that takes no time; `made` counts its calls."""
    monkeypatch.setenv("LBFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "library_name", lambda: "library.so")
    monkeypatch.setattr(native, "_compiler", lambda: "compiler")
    made = []

    def compiled(commands):
        made.append(1)
        for command in commands:
            if "-o" in command:
                with open(command[command.index("-o") + 1], "wb") as file:
                    file.write(b"code" * 1000)

    monkeypatch.setattr(native, "_run_all", compiled)
    return tmp_path / "library.so", made


def test_a_library_is_compiled_once(cache):
    path, made = cache
    assert native.will_compile() and native.build() == path
    content = path.read_bytes()
    assert content.startswith(b"code" * 1000) and native.is_whole(path) and not native.will_compile()
    compiled = len(made)
    assert native.build() == path and path.read_bytes() == content and len(made) == compiled


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:1000],
        lambda content: content[:-1],
        lambda content: bytes(len(content)),
        lambda content: content[:2000] + b"!" + content[2001:],
        lambda content: content + bytes(1),
    ],
)
def test_a_damaged_library_is_compiled_again(cache, damage):
    path, _ = cache
    native.build()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert not native.is_whole(path) and native.will_compile()
    native.build()
    assert path.read_bytes() == content


def test_a_full_disk_leaves_the_library_that_was_there(cache, monkeypatch):
    path, _ = cache
    native.build()
    content = path.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native.files, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        native.compile_library(path)
    assert path.read_bytes() == content
    assert sorted(each.name for each in path.parent.iterdir()) == ["library.lock", "library.so"]


def test_the_real_library_is_sealed_and_loads():
    if native.why_not():
        pytest.skip(native.why_not()[0])
    assert native.is_whole(native.build())


@pytest.mark.parametrize("fails", ["printf '\\377\\376 no'; exit 1", "sleep 0.1; echo no; exit 1"])
def test_where_a_compiler_fails_the_others_end_with_their_children(fails, monkeypatch):
    """Also those that nobody has begun, and a driver's own processes, which hold what it writes to."""
    monkeypatch.setattr(native.os, "cpu_count", lambda: 2)
    begun = time.monotonic()
    with pytest.raises(native.BuildError, match=r"sh failed: .*no"):
        native._run_all([["sh", "-c", "sleep 60 & wait"], ["sh", "-c", fails], *[["sleep", "60"]] * 3])
    assert time.monotonic() - begun < 30


def test_a_compiler_that_hangs_or_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_BUILD_TIMEOUT_S", 0.2)
    with pytest.raises(native.BuildError, match=r"did not end within 0.2 s"):
        native._run_all([["sh", "-c", "sleep 60 & wait"]])
    monkeypatch.setattr(native, "_compiler", lambda: "true")
    with pytest.raises(native.BuildError, match="true made no library"):
        native.compile_library(tmp_path / "library.so")
    assert not list(tmp_path.iterdir())
