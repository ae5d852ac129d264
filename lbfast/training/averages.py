"""Moving averages of trained weights, which often evaluate better than the weights themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from lbfast.model.checkpoint import CheckpointError
from lbfast.training.engine import as_part_of, full
from lbfast.training.parameters import local


class Averages:
    """average = decay * average + (1 - decay) * weight after each step, beginning with the weights.

    The decay of step n is at most n / (n + 9), so that a short run's average is not of where it began.

    Args:
        parameters: that are trained, by name.
        decay: in (0, 1).
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float):
        self._parameters, self._decay = parameters, decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def update(self, step: int) -> None:
        """Takes in the weights after step 1.."""
        share = 1 - min(self._decay, step / (step + 9))
        ours = [local(value) for value in self.values.values()]
        theirs = [local(parameter.detach()) for parameter in self._parameters.values()]
        torch._foreach_lerp_(ours, theirs, share)

    def state(self) -> dict[str, torch.Tensor]:
        """Whole tensors; of sharded ones all processes call."""
        return {name: full(value) for name, value in self.values.items()}

    def load(self, state: Mapping[str, torch.Tensor] | None, where: object) -> None:
        """Takes up what `state` gave. CheckpointError where it is of other parameters."""
        if state is None or {name: x.shape for name, x in state.items()} != {
            n: x.shape for n, x in self.values.items()
        }:
            raise CheckpointError(f"{where}: expected averages of the parameters that this run trains, got others")
        for name, value in self.values.items():
            local(value).copy_(local(as_part_of(state[name], value)))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages for weights inside the block; both are as they were afterwards, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            ours, theirs = local(self.values[name]), local(parameter)
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)
