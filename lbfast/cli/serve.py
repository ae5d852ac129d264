"""`lbfast serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbfast.cli.app import app, errors, plain_errors, say, say_if_compiling
from lbfast.cli.options import CacheDir, Device, Dim, Dtype, Models, OfProducts, Precision, Revision


@app.command(
    help="Prints the address of a server, and makes embeddings of the texts and files that requests bring it.\n\n"
    "Example: lbfast serve --model LanguageBind_Video_FT --model LanguageBind_Audio_FT --port 8000\n\n"
    '[bold]POST /embed[/] takes JSON ({"texts": \\["a dog"]}, or {"items": \\[...]} with base64) or a form (curl -F '
    "video=@a.mp4 -F text=...), and answers JSON, or an array of NumPy's where the request accepts application/x-npy. "
    "[bold]/docs[/] describes it, [bold]/health[/] and [bold]/metrics[/] tell how it is.\n\n"
    "Items of several requests share a batch. One process serves one device: start one for each. SIGTERM and Ctrl-C "
    "end it when what it has taken is answered. It knows no passwords: put it behind what does.\n\n"
    "It needs pip install 'lbfast\\[serve]'."
)
def serve(
    model: Models,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: on every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, help="Items of one modality at a time, at most.")] = 32,
    max_wait: Annotated[
        float, typer.Option(min=0, help="Milliseconds that an item waits for others to join its batch.")
    ] = 5,
    queue: Annotated[int, typer.Option(min=1, help="Items taken and not answered yet; beyond, 503.")] = 256,
    max_items: Annotated[int, typer.Option(min=1, help="Of a request; beyond, 413.")] = 64,
    max_mib: Annotated[int, typer.Option(min=1, help="Of a request's body; beyond, 413.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a body to arrive, and to decode a file.")] = 30,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Open URLs that requests name, by fsspec.")] = False,
    allow_paths: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Open files below this folder that requests name.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode files.")] = 1,
    dim: Dim = None,
    dtype: Dtype = Precision["auto"],
    precision: OfProducts = None,
    device: Device = "auto",
    cache_dir: CacheDir = None,
    revision: Revision = None,
) -> None:
    with plain_errors():
        try:
            from lbfast.serving.server import serve as run
        except ImportError as error:
            raise ImportError(f"{error}; serving needs more packages: pip install 'lbfast[serve]'") from error
        from lbfast.embedding import Embedder
        from lbfast.serving.limits import Limits

        if allow_paths is not None and not allow_paths.is_dir():
            raise ValueError(f"allow-paths: expected a folder, got {allow_paths}")
        say_if_compiling()
        embedder = Embedder(
            model,
            dtype=dtype.value,
            precision=precision.value if precision else None,
            batch_size=batch_size,
            device=device,
            dim=dim,
            allow_urls=allow_urls,
            cache_dir=cache_dir,
            revision=revision,
        )
        limits = Limits(
            items=min(max_items, queue),
            body_bytes=max_mib << 20,
            held_bytes=8 * max_mib << 20,
            waiting=queue,
            body_seconds=timeout,
            decode_seconds=timeout,
            allow_urls=allow_urls,
            allow_paths=None if allow_paths is None else str(allow_paths),
        )
        run(
            embedder,
            host=host,
            port=port,
            limits=limits,
            wait=max_wait / 1000,
            workers=workers,
            on_ready=lambda address: say(f"listening on {address}"),
        )
        errors.print("stopped; what was taken is answered")
