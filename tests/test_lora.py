"""Linear layers with adapters: values and gradients against the plain composition, dropout, what they keep."""

import pytest
import torch
from torch.nn import functional as F

from lbfast.model.lora import LoraLinear


def layer(dropout=0.0, bias=True, dtype=torch.float64, width=(12, 10), r=3):
    torch.manual_seed(0)
    made = LoraLinear(*width, r, alpha=5.0, dropout=dropout, bias=bias).to(dtype)
    torch.nn.init.normal_(made.lora_B.weight)
    return made.requires_grad_(True)


def composed(module, x):
    base = F.linear(x, module.weight, module.bias)
    return base + F.linear(F.linear(x, module.lora_A.weight), module.lora_B.weight) * module.scaling


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 5, 12), (0, 12), (12,)])
def test_values_and_gradients(shape, bias):
    module, x = layer(bias=bias), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, want = module(x), composed(module, x)
    torch.testing.assert_close(out, want)
    wanted = (x, *module.parameters())
    do = torch.randn_like(out)
    for mine, theirs in zip(torch.autograd.grad(out, wanted, do), torch.autograd.grad(want, wanted, do)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout):
    module, x = layer(dropout), torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    def call(x, weight, bias, a, b):
        torch.manual_seed(3)  # the same part drops out at every call
        return torch.func.functional_call(
            module, {"weight": weight, "bias": bias, "lora_A.weight": a, "lora_B.weight": b}, (x,)
        )

    parameters = (module.weight, module.bias, module.lora_A.weight, module.lora_B.weight)
    assert torch.autograd.gradcheck(call, (x, *(p.detach().clone().requires_grad_() for p in parameters)))


def test_dropout_is_of_the_adapter_alone_and_only_in_training():
    module, x = layer(0.25, width=(4000, 4000), r=1, dtype=torch.float32), torch.ones(1, 4000)
    with torch.no_grad():
        module.lora_A.weight.fill_(1.0)
        module.lora_B.weight.fill_(1.0)
        module.scaling = 1.0
        seen = (module(x) - F.linear(x, module.weight, module.bias))[0]
        again = (module(x) - F.linear(x, module.weight, module.bias))[0]
        kept = seen.mean() * 0.75  # of 4000 inputs, those that were left, by 1 / 0.75
        assert abs(kept - 3000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 and seen.mean() != again.mean()
        torch.testing.assert_close(module.eval()(x), composed(module, x))


def test_readers_of_one_input_keep_it_once():
    """q, k and v: what each keeps beyond its weights and x is A x."""
    modules, x = [layer(0.5, dtype=torch.float32) for _ in range(3)], torch.randn(64, 12, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outs = [module(x) for module in modules]
    weights = {p.data_ptr() for module in modules for p in module.parameters()}
    assert sum(size for at, size in kept.items() if at not in weights) == 4 * (64 * 12 + 3 * 64 * 3)
    sum(out.sum() for out in outs).backward()


def test_autocast():
    module, x = layer(0.1, dtype=torch.float32), torch.randn(6, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == torch.float32 and module.lora_A.weight.grad.dtype == torch.float32


def test_compiles():
    module, x = layer(), torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), composed(module, x))
