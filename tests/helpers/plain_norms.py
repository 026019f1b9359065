"""Batch-normalised branches written out, a convolution and an ``nn.BatchNormNd`` per branch, and their judges."""

import copy
import re

import torch
import torch.nn.functional as F
from torch import nn

from autofocus_kernels import testing
from autofocus_kernels.branch_norm import normed_autofocus_conv
from autofocus_kernels.testing import Case, relative_error

CASES = (
    Case("3d", (5, 6, 7), dilations=(2, 4, 6), batch=2),
    Case("2d", (9, 7), dilations=(1, 3, 5, 7), batch=2),
    Case("1d", (17,), dilations=(2, 5), batch=2),
    Case("no_bias", (4, 5, 3), bias=False),
    Case("normal_gate", (6, 7), gate="normal"),
    Case("valid", (9, 8, 10), padding="valid", dilations=(2, 3, 7)),
    Case("stride", (9, 8), stride=(2, 1), padding=1),
    Case("dilation_per_axis", (6, 7), dilations=((1, 2), (3, 1))),
    Case("dilation_beyond_volume", (4, 5, 3), dilations=(2, 8, 16)),
    Case("one_branch", (6, 7), dilations=(2,)),
    Case("kernel_1", (5, 6, 7), kernel_size=1),
    Case("many_samples", (3, 4), batch=20),
    Case("slabs_of_one_row", (37, 6), dilations=(1, 2), stride=(5, 1), padding=1),
    Case("slabs", (13, 7, 7), out_channels=20, dilations=(1, 2) * 4),
    Case("one_channel", (6, 7), channels=1, out_channels=1),
    Case("channels_30_to_40", (4, 5, 6), channels=30, out_channels=40, batch=2),
    Case("channels_last", (5, 6, 7), layout="channels_last", batch=2),
    Case("channels_last_2d", (9, 7), layout="channels_last", channels=7, batch=2),
    Case("transposed", (5, 6, 7), layout="transposed", batch=2),
    Case("sliced", (5, 6, 7), layout="sliced", batch=2),
    Case("expanded", (5, 6, 7), layout="expanded", batch=3),
)
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def plain(input, weight, attention, bias, norms, *, dilations, stride=1, padding="same"):
    """``sum_k a_k norms[k](conv(x, W, r_k))`` with the bias in the first branch: independent of the package's own."""
    dims = input.dim() - 2
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    each = lambda value: (value,) * dims if isinstance(value, int) else tuple(value)  # noqa: E731
    rates = [each(dilation) for dilation in dilations]
    halves = [size // 2 for size in weight.shape[2:]]
    smallest = [min(rate[axis] for rate in rates) for axis in range(dims)]
    if padding == "same":
        padding = [smallest[axis] * halves[axis] for axis in range(dims)]
    padding = (0,) * dims if padding == "valid" else each(padding)
    total = 0
    for k, rate in enumerate(rates):
        pads = [padding[i] + (rate[i] - smallest[i]) * halves[i] for i in range(dims)]
        around = [side for pad in reversed(pads) for side in (pad, pad)]
        branch = conv(F.pad(input, around), weight, bias if k == 0 else None, stride, 0, rate)
        total = total + attention[:, k : k + 1] * norms[k](branch)
    return total


def make_norms(case, dtype=torch.float64, device="cpu"):
    """K norms with nothing at its initial value."""
    generator = torch.Generator().manual_seed(1)
    norms = nn.ModuleList(NORM[case.spatial_dims](case.out_channels) for _ in case.dilations)
    for norm in norms:
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
    return norms.to(device=device, dtype=dtype)


def evaluate(function, case, tensors, norms):
    """Output, gradients of all arguments and parameters, and running statistics after the call."""
    names = [name for name in ("input", "weight", "attention", "bias") if getattr(tensors, name) is not None]
    leaves = {name: getattr(tensors, name).detach().requires_grad_() for name in names}
    output = function(*(leaves.get(n) for n in ("input", "weight", "attention", "bias")), norms, **case.options)
    parameters = dict(norms.named_parameters())
    gradients = torch.autograd.grad(output, [*leaves.values(), *parameters.values()], tensors.grad_output)
    return {
        "output": output.detach(),
        **{f"gradient of {name}": g for name, g in zip([*leaves, *parameters], gradients)},
        **dict(norms.named_buffers()),
    }


def assert_same(results, expected, limit=1e-11):
    for name, value in expected.items():
        if name == "gradient of bias" and value.abs().max() < 1e-9:
            assert results[name].abs().max() <= limit, name  # zero but for rounding in the plain layer
        else:
            error = relative_error(results[name], value)
            assert error <= limit, f"{name}: relative error {error:.1e}, allowed {limit:.1e}"
    assert results.keys() == expected.keys()


def run_both(case, tensors, norms, backend, **options):
    def fused(*arguments, **settings):
        return normed_autofocus_conv(*arguments, **settings, backend=backend, **options)

    with testing.poisoned_memory():
        results = evaluate(fused, case, tensors, copy.deepcopy(norms))
    return results, evaluate(plain, case, tensors, norms)


def compare(function, case, tensors, norms):
    """Results of ``function``, checked against float64 truth by the error of the plain layer in the same dtype.

    In float32 the order of sums decides; in 16 bits there is the rounding of branches, and so of what their statistics
    are of, and of the gradients of branches.
    """
    exact = testing.Tensors(*(t if t is None else t.double() for t in tensors))
    truth = evaluate(plain, case, exact, copy.deepcopy(norms).double())
    same_dtype = evaluate(plain, case, tensors, copy.deepcopy(norms))
    with testing.poisoned_memory():
        results = evaluate(function, case, tensors, copy.deepcopy(norms))
    problems = []
    for name, value in truth.items():
        if name == "gradient of bias":
            assert not results[name].any()
            continue
        own, error = relative_error(same_dtype[name], value), relative_error(results[name], value)
        assert results[name].dtype == same_dtype[name].dtype
        eps = torch.finfo(same_dtype[name].dtype if "gradient" in name else tensors.input.dtype).eps
        limit = 4 * own + 1e-6 if tensors.input.dtype == torch.float32 else 2 * own + eps
        if not error <= limit:
            problems.append(f"{name}: relative error {error:.1e}, allowed {limit:.1e}")
    assert not problems, "; ".join(problems)
    return results


def check_rounding(case, backend, dtype, save_branches, training=True, device="cpu"):
    """Twice the error of the plain layer in the same dtype, plus a rounding; parameters of norms stay float32.

    A parameter of one channel has a gradient of one number, whose error may be next to nothing by luck: those of all
    branches are held against the plain layer's worst.
    """
    tensors = testing.make_tensors(case, dtype, device)
    norms = make_norms(case, torch.float32, device).train(training)
    exact = testing.Tensors(*(t if t is None else t.double() for t in tensors))
    truth = evaluate(plain, case, exact, copy.deepcopy(norms).double())
    results, same_dtype = run_both(case, tensors, norms, backend, save_branches=save_branches)
    worst = {}
    for name, value in truth.items():
        if value.is_floating_point():
            of_all = re.sub(r"\d+", "", name)
            worst[of_all] = max(worst.get(of_all, 0.0), relative_error(same_dtype[name], value))
    for name, value in truth.items():
        if name == "gradient of bias" and training:
            assert not results[name].any()
            continue
        if not value.is_floating_point():
            assert torch.equal(results[name], value)
            continue
        # By running statistics scale and shift, and so their gradients, pass through the dtype of the tensors.
        eps = torch.finfo(same_dtype[name].dtype if training and "gradient" in name else dtype).eps
        limit = 2 * worst[re.sub(r"\d+", "", name)] + eps
        error = relative_error(results[name], value)
        assert error <= limit, f"{name}: relative error {error:.1e}, allowed {limit:.1e}"
        assert results[name].dtype == same_dtype[name].dtype
    return results


def plain_layer(layer, input, norms=None):
    attention = layer.attention(input.detach() if layer.detach_attention else input)
    return plain(
        input,
        layer.weight,
        attention,
        layer.bias,
        norms or layer.branch_norm,
        dilations=layer.dilations,
        stride=layer.stride,
        padding=layer.padding,
    )
