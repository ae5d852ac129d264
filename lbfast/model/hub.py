"""Where a checkpoint is: a directory, lbfast-mini, or a repository of the hub; its files, and JSON read from them.

What `from_pretrained` of models, configurations, processors and tokenizers has in common is here: the names, and the
keywords. Files are untrusted: sizes and depths are bounded before anything is made of them.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lbfast.messages import listing, named, plain, shown

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

_MINI = Path(__file__).parents[1] / "mini" / "weights"
_ORGANISATION = "LanguageBind"
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_MOST_JSON = 64 << 20
_DEEPEST = 32


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the keys or fields."""

    def __init__(self, message: str):
        super().__init__(plain(message))


class NotCachedError(OSError):
    """A file of the hub that is not in the cache, while the hub cannot be reached."""


def full_name(where: str | os.PathLike[str]) -> str:
    """A local path or full repository id as it is; a bare name becomes one of the hub's LanguageBind organisation.

    "lbfast-mini/video" and the like are the small models that come with the package. ValueError for others of them.
    """
    name = os.fspath(where)
    if Path(name).is_dir():
        return name
    owner, _, modality = name.partition("/")
    if owner == "lbfast-mini":
        if not re.fullmatch(r"\w+", modality) or not (_MINI / modality / "config.json").is_file():
            known = ", ".join(sorted(f"lbfast-mini/{path.parent.name}" for path in _MINI.glob("*/config.json")))
            raise ValueError(f"{name}: expected one of {known}")
        return str(_MINI / modality)
    bare = "/" not in name and not Path(name).exists() and _REPOSITORY.fullmatch(name)
    return f"{_ORGANISATION}/{name}" if bare else name


def _check_repository(name: str) -> None:
    """Raises FileNotFoundError for what can only be a path, and names nothing."""
    path = Path(name)
    if path.exists():
        raise NotADirectoryError(errno.ENOTDIR, "expected the directory of a checkpoint, got something else", name)
    if not _REPOSITORY.fullmatch(name) or ".." in name or name.startswith((".", "-")):
        raise FileNotFoundError(errno.ENOENT, "no such file or directory, and no name of the hub", plain(name))


def fetch_file(
    repo_id: str,
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
) -> Path:
    """A file of a hub repository, from the cache or the network. Where the hub cannot be reached, that is said at once.

    Raises:
        huggingface_hub.errors.EntryNotFoundError: the repository has no such file.
        FileNotFoundError: the name is a path, of nothing.
        NotCachedError: the hub cannot be reached and the file is not cached. OSError: the name is no repository.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    _check_repository(repo_id)
    place: dict[str, Any] = {
        "revision": revision,
        "cache_dir": None if cache_dir is None else Path(cache_dir),
    }
    inside = f"{subfolder}/{name}" if subfolder else name
    try:
        if not local_files_only and not _is_cached(repo_id, inside, place):
            _reach(repo_id, inside, revision, token)  # a download would try for half a minute
        found = hf_hub_download(
            repo_id, inside, token=token, local_files_only=local_files_only, force_download=force_download, **place
        )
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise NotCachedError(
            f"{repo_id}: not a local directory, and {inside} of the hub repository of that name is neither in the "
            f"cache ({cache_dir or 'default'}) nor can it be fetched (offline?)"
        ) from error
    except EntryNotFoundError:
        raise
    except (HfHubHTTPError, HFValidationError) as error:
        raise OSError(f"{repo_id}: not a local directory, and the hub answered: {plain(error, 500)}") from error
    return Path(found)


def _is_cached(repo_id: str, name: str, place: Mapping[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo_id, name, **place), str)


def _reach(repo_id: str, name: str, revision: str | None, token: str | bool | None) -> None:
    """Asks the hub for the file's metadata, once. Raises ConnectionError where nobody answers, or what the hub says."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision), token=token)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # of whichever client the hub's library uses; offline mode too
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def find_file(name_or_path: str | os.PathLike[str], name: str, *, subfolder: str | None = None, **hub: Any) -> Path:
    """One file of a local directory or a repository.

    Raises FileNotFoundError where there is the place but not the file, and what `fetch_file` raises.
    """
    path = Path(name_or_path)
    if path.is_dir():
        file = path / (subfolder or "") / name
        if not file.is_file():
            raise FileNotFoundError(f"{file.parent}: expected a {name} in this directory, found none")
        return file
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return fetch_file(os.fspath(name_or_path), name, subfolder=subfolder, **hub)
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{name_or_path}: expected a {name} in this repository, found none") from error


def find_some(name_or_path: str | os.PathLike[str], names: Iterable[str], **hub: Any) -> dict[str, Path]:
    """Those of some files that are there. Raises OSError for a repository that is not, and where none can be had."""
    found, absent = {}, None
    for name in names:
        try:
            found[name] = find_file(name_or_path, name, **hub)
        except FileNotFoundError as error:
            if error.errno is not None:  # not the file is missing, but where it should be
                raise
        except NotCachedError as error:  # the repository may be cached with another of the files
            absent, hub = absent or error, {**hub, "local_files_only": True}
    if absent is not None and not found:
        raise absent
    return found


def find_files(
    name_or_path: str | os.PathLike[str],
    *,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    **hub: Any,
) -> list[Path]:
    """The weight files of a local directory or of a repository on the hub: one, or the shards of an index.

    Args:
        use_safetensors: only those, or only pickles; None: either.
        variant: as in model.fp16.safetensors.
        hub: as of `fetch_file`.

    Raises:
        FileNotFoundError: a local directory, or a repository, without weights.
        OSError: a hub name that is neither cached nor reachable.
        CheckpointError: a broken index, or one that names a missing shard.
    """
    names = [name for name in WEIGHTS if use_safetensors is None or ("safetensors" in name) == use_safetensors]
    if variant:
        names = [f"{stem}.{variant}.{suffix}" for stem, _, suffix in (name.rpartition(".") for name in names)]
    local = Path(name_or_path).is_dir()
    found = find_first(name_or_path, names, **hub)
    if found is None:
        where = Path(name_or_path) / (hub.get("subfolder") or "") if local else name_or_path
        kind = "directory" if local else "repository"
        raise FileNotFoundError(f"{where}: expected one of {', '.join(names)} in this {kind}, found none")
    if found.suffix != ".json":
        return [found]
    shards = shard_names(found)
    if not local:
        return [find_file(name_or_path, shard, **hub) for shard in shards]
    missing = [shard for shard in shards if not (found.parent / shard).is_file()]
    if missing:
        raise CheckpointError(f"{found}: names files that are not there: {listing(missing)}")
    return [found.parent / shard for shard in shards]


def find_first(name_or_path: str | os.PathLike[str], names: Sequence[str], **hub: Any) -> Path | None:
    """The first of these files that is there. Raises OSError as `find_some` does."""
    absent = None
    for name in names:
        try:
            return find_file(name_or_path, name, **hub)
        except FileNotFoundError as error:
            if error.errno is not None:
                raise
        except NotCachedError as error:
            absent, hub = absent or error, {**hub, "local_files_only": True}
    if absent is not None:
        raise absent
    return None


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names. Raises CheckpointError for something else."""
    fields = read_json(index)
    names = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: expected an index of shards with a weight_map, got something else")
    files = set(map(str, names.values()))
    suffix = "safetensors" if "safetensors" in index.name else "bin"
    bad = [name for name in files if Path(name).name != name or not name.endswith(f".{suffix}")]
    if bad:
        raise CheckpointError(f"{index}: expected plain file names *.{suffix} in weight_map, got {listing(bad)}")
    return sorted(files)


def read_json(file: Path, most: int = _MOST_JSON) -> Any:
    """What a JSON file holds, containers within containers 32 deep at most.

    Raises CheckpointError naming the file where it is larger, deeper, or none. OSError: it cannot be read.
    """
    size = file.stat().st_size
    if size > most:
        raise CheckpointError(f"{file}: expected JSON of at most {most >> 20} MiB, got {size >> 20} MiB")
    try:
        found = json.loads(file.read_bytes().decode("utf-8-sig"), parse_constant=_no_number)
        deep, level = 0, [found]
        while level := [child for item in level if isinstance(item, (dict, list)) for child in _children(item)]:
            deep += 1
            if deep > _DEEPEST:
                raise RecursionError
    except RecursionError:
        raise CheckpointError(f"{file}: expected JSON nested at most {_DEEPEST} deep, got deeper") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, cannot read it: {named(error)}") from error
    return found


def _children(item: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


_HUB = ("cache_dir", "revision", "token", "local_files_only", "force_download", "subfolder")
_CHANGE_NOTHING = (  # without effect, whatever they are
    "code_revision",  # no code of a checkpoint is ever run
    "commit_hash",
    "low_cpu_mem_usage",  # it always is
    "mirror",
    "resume_download",
    "trust_remote_code",
    "use_fast",
    "user_agent",
    "_commit_hash",
    "_fast_init",
    "_from_auto",
    "_from_pipeline",
)
_ONLY: dict[str, tuple[Any, str]] = {  # what they must be, and why
    "proxies": (None, "set HTTPS_PROXY"),
    "from_tf": (False, "only PyTorch's weights are read"),
    "from_flax": (False, "only PyTorch's weights are read"),
    "gguf_file": (None, "only safetensors and PyTorch's pickles are read"),
    "weights_only": (True, "pickles are read as plain tensors, never run"),
}


def hub_options(given: dict[str, Any]) -> dict[str, Any]:
    """Takes from keywords of a `from_pretrained` what says where files come from, and what changes nothing.

    Args:
        given: keywords; what remains in it is the caller's.

    Returns:
        Keywords of `fetch_file`.

    Raises:
        ValueError: a keyword of Hugging Face's whose value asks for what is not done here.
    """
    for name in _CHANGE_NOTHING:
        given.pop(name, None)
    check_only(given, _ONLY)
    legacy = given.pop("use_auth_token", None)
    options = {name: given.pop(name) for name in _HUB if name in given}
    if legacy is not None and options.get("token") is None:
        options["token"] = legacy
    return {name: value for name, value in options.items() if value is not None}


def check_only(given: dict[str, Any], only: Mapping[str, tuple[Any, str]]) -> None:
    """Takes keywords that may have one value, or None. Raises ValueError, with the reason, for any other."""
    for name, (value, why) in only.items():
        if name in given and (found := given.pop(name)) is not None and found != value:
            raise ValueError(f"{name}: expected {value!r}, got {shown(found)}; {why}")


def unexpected(function: str, given: Mapping[str, Any]) -> None:
    """Raises TypeError, as Python does, where keywords remain."""
    if given:
        raise TypeError(f"{function}() got an unexpected keyword argument {next(iter(given))!r}")


@functools.cache
def said(message: str) -> None:
    """Warns of something once a process."""
    import warnings

    warnings.warn(message, stacklevel=3)
