"""`lbfast serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lbfast.cli.app import Precision, Products, app, errors, plain_errors


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
    model: Annotated[
        list[str],
        typer.Option(
            metavar="[MODALITY=]DIR_OR_NAME",
            help="A checkpoint: local directory, or name on the hub. Once for each modality.",
        ),
    ],
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
    dim: Annotated[
        int | None, typer.Option(min=1, help="Keep the first so many numbers, of unit length again. Default: all.")
    ] = None,
    dtype: Annotated[
        Precision, typer.Option(help="Of the weights. auto: bfloat16 where the device computes in it.")
    ] = Precision["auto"],
    precision: Annotated[
        Products | None, typer.Option(help="Of the layers' products: int8 on a CPU, fp8 on a GPU; less exact, faster.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the checkpoints on the hub.")] = None,
) -> None:
    with plain_errors():
        try:
            from lbfast.serving.server import serve as run
        except ImportError as error:
            raise ImportError(f"{error}; serving needs more packages: pip install 'lbfast[serve]'") from error
        from lbfast import native
        from lbfast.embedding import Embedder
        from lbfast.serving.limits import Limits

        if allow_paths is not None and not allow_paths.is_dir():
            raise ValueError(f"allow-paths: expected a folder, got {allow_paths}")
        if native.will_compile():
            errors.print("compiling the native CPU kernels, once for each version: this takes a minute")
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
            on_ready=lambda address: typer.echo(f"listening on {address}"),
        )
        errors.print("stopped; what was taken is answered")
