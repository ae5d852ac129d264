"""Encoders as OpenVINO and ONNX Runtime run them on a CPU: exported from the eager reference, on as many threads.

    pip install openvino nncf onnxruntime onnx onnxscript      (the extra "peers")

int8 is theirs as their own guides have it: OpenVINO's by NNCF for transformers with SmoothQuant, calibrated with the
inputs that are measured, which flatters it; ONNX Runtime's dynamic, a scale for each output.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .peers import absent

Inputs = Mapping[str, torch.Tensor]
Embed = Callable[[Inputs], torch.Tensor]


class _Tower(nn.Module):
    """A method of a model as a module of positional inputs."""

    def __init__(self, model: nn.Module, method: str, names: tuple[str, ...]):
        super().__init__()
        self.model, self.method, self.names = model, method, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.method)(**dict(zip(self.names, inputs)))


def openvino(model: nn.Module, method: str, given: Inputs, dtype: str) -> Embed:
    """Compiled for the shapes of `given`. dtype: float32, bfloat16 or int8, whose rest is bfloat16 where that is fast.

    Raises ImportError where OpenVINO, or NNCF for int8, is absent.
    """
    runtime = absent("openvino")
    names, inputs = tuple(given), tuple(given.values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = runtime.convert_model(_Tower(model, method, names), example_input=inputs)
    exported.reshape(dict(enumerate([*x.shape] for x in inputs)))
    arrays = [x.numpy() for x in inputs]
    if dtype == "int8":
        nncf = absent("nncf")
        logging.getLogger("nncf").setLevel(logging.ERROR)
        data = nncf.Dataset([arrays if len(arrays) > 1 else arrays[0]])
        exported = nncf.quantize(exported, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    core = runtime.Core()
    short = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" or not short else "bf16",
    }
    request = core.compile_model(exported, "CPU", options).create_infer_request()
    del exported
    gc.collect()

    def embed(given: Inputs) -> torch.Tensor:
        found = request.infer([x.numpy() for x in given.values()])
        return torch.from_numpy(found[0].copy())

    return embed


def onnxruntime(model: nn.Module, method: str, given: Inputs, dtype: str) -> Embed:
    """dtype: float32 or int8. Raises ImportError where ONNX Runtime, or what exports for it, is absent."""
    runtime = absent("onnxruntime")
    absent("onnx")
    names, inputs = tuple(given), tuple(given.values())
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Tower(model, method, names), inputs, path, input_names=list(names), dynamo=False, opset_version=17
            )
        if dtype == "int8":
            quantization = importlib.import_module("onnxruntime.quantization")
            logging.getLogger().setLevel(logging.ERROR)
            short = os.path.join(folder, "int8.onnx")
            quantization.quantize_dynamic(
                path, short, per_channel=True, weight_type=quantization.QuantType.QInt8, use_external_data_format=True
            )
            path = short
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embed(given: Inputs) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in given.items()})[0])

    return embed
