"""Blends in bfloat16, as the Triton kernels do on a GPU but not in the interpreter, keep the rule for 16-bit types.

The kernels' arithmetic in PyTorch: a blend takes one fused multiply-add per branch, each rounded to bfloat16; products
are summed in float32 and rounded once. The rule: at most twice the plain layer's error, plus a rounding.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from autofocus_kernels import testing
from autofocus_kernels.testing import Case

CASES = [
    Case(f"{gate}_{len(dilations)}_branches{'_scaled' if mode == 'scale' else ''}", (9, 10, 11), 24, 20,
         dilations=dilations, gate=gate, mode=mode, bias=False)
    for gate in ("softmax", "normal", "one_hot")
    for dilations in ((1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7))
    for mode in ("plain", "scale")
]


def rounded(tensor, dtype):
    return tensor.to(dtype).float()


def shifted(tensor, offsets):
    """``tensor[p + offset]`` at every p, zero outside."""
    pads = [pad for offset in reversed(offsets) for pad in (max(0, -offset), max(0, offset))]
    padded = F.pad(tensor, pads)
    window = tuple(slice(max(0, offset), max(0, offset) + n) for offset, n in zip(offsets, tensor.shape[2:]))
    return padded[(..., *window)]


def blend(terms, dtype):
    """The sum of gate * tile, one fused multiply-add each."""
    total = torch.zeros(())
    for gate, tile in terms:
        total = rounded(gate * tile + total, dtype)  # gate * tile is exact in float32
    return total


def taps(case):
    return list(itertools.product((-1, 0, 1), repeat=case.spatial_dims))


def kernels(case, tensors, dtype):
    """"output", and the gradients "input" and "weight", with blends in ``dtype``."""
    x, gate, grad = (tensor.float() for tensor in (tensors.input, tensors.attention, tensors.grad_output))
    weight = tensors.weight.float().flatten(2)
    gates = gate.split(1, dim=1)
    scales = None if tensors.branch_scale is None else tensors.branch_scale.float()[:, :, None, None, None]
    output, grad_input = torch.zeros_like(grad), torch.zeros_like(x)
    grad_weight = torch.zeros_like(weight)
    for t, tap in enumerate(taps(case)):
        reads = [[r * offset for offset in tap] for r in case.dilations]
        if scales is None:
            if any(tap):
                u = blend([(gates[k], shifted(x, read)) for k, read in enumerate(reads)], dtype)
            else:
                u = rounded(gate.sum(1, keepdim=True) * x, dtype)
            output += torch.einsum("oc,nc...->no...", weight[..., t], u)
        terms = []
        for k, read in enumerate(reads):
            back = [-offset for offset in read]
            g = shifted(grad, back)
            terms.append((shifted(gates[k], back), g if scales is None else rounded(g * scales[k], dtype)))
        v = blend(terms, dtype)
        grad_input += torch.einsum("oc,no...->nc...", weight[..., t], v)
        grad_weight[..., t] = torch.einsum("nodhw,ncdhw->oc", v, x)
    results = {"input": grad_input, "weight": grad_weight.view(tensors.weight.shape)}
    if scales is None:  # a scaled forward blends nothing
        results["output"] = output
    return {name: result.to(torch.bfloat16) for name, result in results.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blends_in_bfloat16_are_within_the_rule(case):
    for seed in (0, 1):
        tensors = testing.make_tensors(case, torch.bfloat16, seed=seed)
        expected = testing.truth(case, tensors)
        limits = testing.tolerances(case, tensors, expected)
        for name, result in kernels(case, tensors, torch.bfloat16).items():
            assert testing.relative_error(result, expected[name]) <= limits[name], name


def test_the_emulation_is_the_layer():
    """Without the rounding of blends it agrees with truth to one rounding of the result."""
    case = CASES[1]
    tensors = testing.make_tensors(case, torch.bfloat16)
    expected = testing.truth(case, tensors)
    for name, result in kernels(case, tensors, torch.float32).items():
        assert testing.relative_error(result, expected[name]) < torch.finfo(torch.bfloat16).eps / 2, name
