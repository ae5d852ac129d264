"""`lbfast bench`: the project's own benches, on a user's shapes."""

from __future__ import annotations

import importlib

import typer

from lbfast.cli.app import app, plain_errors

BENCHES = {
    "languagebind": "whole encoders against upstream's arithmetic",
    "attention": "attention over tokens",
    "temporal_attention": "attention over frames",
    "patch_embed": "pixels to tokens",
    "layer_norm": "layer norm, with a residual",
    "mlp": "the two-layer perceptron",
    "info_nce": "the contrastive loss: time and memory",
    "sigmoid_loss": "SigLIP's loss: time and memory",
    "training": "a step of training: time and memory",
    "files": "files to tensors: CPU time a file, and how busy a model is kept",
}


@app.command(
    help="Prints times of this machine: an op or whole encoders, beside what else computes the same.\n\n"
    "Example: lbfast bench attention --shape 257 16 64\n\n"
    + "\n\n".join(f"[bold]{name}[/]  {what}" for name, what in BENCHES.items())
    + "\n\nWhat follows the name goes to the bench: [bold]lbfast bench attention --help[/] shows what it takes.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def bench(
    context: typer.Context,
    what: str = typer.Argument(metavar="NAME", help="One of the above."),
) -> None:
    with plain_errors():
        name = what.replace("-", "_")
        if name not in BENCHES:
            raise ValueError(f"NAME: expected one of {', '.join(BENCHES)}, got {what!r}")
        from lbfast import native

        native.why_not()  # compiles what is not compiled yet, before anything is timed
        module = importlib.import_module(f"lbfast.bench.bench_{name}")
        raise typer.Exit(module.main(context.args))
