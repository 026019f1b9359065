"""torch.library's own checks, torch.compile, torch.export and autocast."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from autofocus_kernels import (
    AutofocusConv1d,
    AutofocusConv2d,
    AutofocusConv3d,
    autofocus_conv,
    decompositions,
    reference,
    testing,
)
from autofocus_kernels.testing import Case

CASES = (
    Case("plain", (4, 5), channels=3, out_channels=4, dilations=(1, 2)),
    Case("branch", (4, 5), channels=3, out_channels=4, dilations=(1, 2), mode="branch"),
    Case("3d", (4, 3, 5), channels=2, out_channels=3, dilations=(1, 2), layout="channels_last", bias=False),
    Case("stride", (9,), channels=2, out_channels=3, dilations=(2, 3), stride=2, padding=1),
    Case("empty", (4, 0), channels=2, out_channels=3, dilations=(2, 3)),
)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


# ------------------------------------------------------------------ the operators


def operator_arguments(case, backend, requires_grad):
    return testing.make_tensors(case, requires_grad=requires_grad), (*case.geometry.integers, backend)


FULL = [(case, True) for case in CASES] + [(CASES[1], False)]  # the latter has every tensor argument but a bias


@pytest.mark.parametrize("case, requires_grad", FULL, ids=str)
def test_opcheck_forward(backend, case, requires_grad):
    tensors, settings = operator_arguments(case, backend, requires_grad)
    opcheck(torch.ops.autofocus.forward.default, (*tensors[:6], *settings))


@pytest.mark.parametrize(
    "case, requires_grad, wanted",
    [*((*each, "all") for each in FULL), (CASES[1], True, "input"), (CASES[1], False, "weight")],
    ids=str,
)
def test_opcheck_backward(backend, case, requires_grad, wanted):
    tensors, settings = operator_arguments(case, backend, requires_grad)
    mask = [t is not None and wanted in ("all", name) for name, t in zip(tensors._fields, tensors[:6])]
    opcheck(torch.ops.autofocus.backward.default, (tensors.grad_output, *tensors[:6], *settings, mask))


def test_meta_tensors_give_the_shape():
    tensors = testing.make_tensors(CASES[0], device="meta")
    output = autofocus_conv(**tensors.arguments(), **CASES[0].options)
    assert output.is_meta and output.shape == (1, 4, 4, 5)


# ------------------------------------------------------------------ torch.compile


@each_case
def test_fullgraph_forward_and_backward(backend, case):
    """One graph, gradients right, and no recompile for new values of the same shapes."""
    function = partial(autofocus_conv, backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    for seed in range(2):
        tensors = testing.make_tensors(case, seed=seed)
        results = testing.evaluate(compiled, case, tensors)
        expected = testing.evaluate(function, case, tensors)
        for name in expected:
            torch.testing.assert_close(results[name], expected[name], msg=lambda text: f"{name}: {text}")
        assert results["output"].stride() == expected["output"].stride()
        torch.compiler.set_stance("fail_on_recompile")


@pytest.fixture(autouse=True)
def default_stance():
    yield
    torch.compiler.set_stance("default")


def test_layer_in_a_network_through_inductor(backend):
    """The layer between operations that the compiler fuses; inductor may change layouts around the operator."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ReLU(),
        AutofocusConv2d(6, 5, dilations=(1, 2), backend=backend),
        nn.Sigmoid(),
    )
    compiled = torch.compile(network, fullgraph=True)
    input = torch.randn(2, 3, 7, 9).contiguous(memory_format=torch.channels_last)

    def gradients(model):
        network.zero_grad()
        output = model(input)
        output.square().sum().backward()
        return [output.detach(), *(parameter.grad.clone() for parameter in network.parameters())]

    expected = gradients(network)
    for result, eager in zip(gradients(compiled), expected):
        assert testing.relative_error(result, eager) < 1e-5


def test_dynamic_shapes_compile_once(backend):
    function = torch.compile(
        partial(autofocus_conv, backend=backend), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for i, size in enumerate(((11, 12), (7, 10), (8, 9))):
        case = Case("dynamic", size, dilations=(1, 2))
        tensors = testing.make_tensors(case)
        testing.judge(testing.evaluate(function, case, tensors), case, tensors)
        if i == 0:
            torch.compiler.set_stance("fail_on_recompile")


class Marked(torch.Tensor):
    """A subclass that adds nothing: what __torch_function__ makes of a result is what is tested."""


@pytest.mark.parametrize("branch_norm", [False, True])
def test_a_subclass_of_tensor_stays_one(branch_norm):
    layer = AutofocusConv2d(2, 3, dilations=(1, 2), branch_norm=branch_norm)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    input = torch.randn(2, 2, 5, 6)
    output, expected = (f(input.as_subclass(Marked)) for f in (compiled, layer))
    assert type(output) is type(expected) is Marked
    torch.testing.assert_close(output, expected)


TRANSFORMS = {
    "grad": lambda f, x: grad(lambda t: f(t).tanh().sum())(x),
    "grad over samples": lambda f, x: vmap(grad(lambda t: f(t[None]).tanh().sum()))(x),
    "vjp": lambda f, x: vjp(lambda t: f(t).tanh(), x)[1](torch.ones(2, 3, 4, 5))[0],
    "jvp": lambda f, x: jvp(lambda t: f(t).tanh(), (x,), (x.sin(),))[1],
    "hessian": lambda f, x: hessian(lambda t: f(t).tanh().sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_compile(transform):
    layer = AutofocusConv2d(2, 3, dilations=(1, 2)).requires_grad_(False)
    input = torch.randn(2, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    transformed = partial(TRANSFORMS[transform], layer)
    compiled = torch.compile(transformed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input), transformed(input), rtol=1e-4, atol=1e-5)


def test_reference_compiles():
    case = CASES[1]
    tensors = testing.make_tensors(case)
    compiled = torch.compile(reference.autofocus_conv, fullgraph=True, backend="aot_eager")
    testing.judge(testing.evaluate(compiled, case, tensors), case, tensors)


# ------------------------------------------------------------------ torch.export


def test_export_of_the_layer():
    layer = AutofocusConv3d(2, 3, dilations=(1, 2)).eval()
    input = torch.randn(1, 2, 5, 6, 4)
    program = torch.export.export(layer, (input,))
    assert any("autofocus.forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(input), layer(input))


def test_export_with_dynamic_batch_and_size():
    layer = AutofocusConv2d(2, 3, dilations=(1, 2)).eval()
    dim = torch.export.Dim
    program = torch.export.export(
        layer, (torch.randn(2, 2, 8, 9),), dynamic_shapes=({0: dim.AUTO, 2: dim.AUTO, 3: dim.AUTO},)
    )
    for shape in ((3, 2, 8, 9), (2, 2, 11, 6)):
        input = torch.randn(shape)
        torch.testing.assert_close(program.module()(input), layer(input))


@pytest.mark.parametrize("kernel_size, stride, padding", [(3, 2, 1), (3, 3, 5), (5, 2, 2)])
def test_export_with_named_sizes_and_a_stride(kernel_size, stride, padding):
    """A named dimension takes every size of its range, as that of a convolution does."""
    layer = AutofocusConv2d(2, 3, kernel_size, stride, padding, dilations=(1, 2)).eval()
    names = {2: torch.export.Dim("height", min=3, max=64), 3: torch.export.Dim("width", min=3, max=64)}
    program = torch.export.export(layer, (torch.randn(1, 2, 8, 9),), dynamic_shapes=(names,))
    for size in ((3, 4), (11, 6)):
        input = torch.randn(1, 2, *size)
        torch.testing.assert_close(program.module()(input), layer(input))


def test_an_exported_layer_has_all_derivatives():
    """Which its operators hold: nothing of Python is left."""
    layer = AutofocusConv2d(2, 3, dilations=(1, 2)).eval()
    input = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(layer, (input,)).module()
    for derivative in (TRANSFORMS["jvp"], TRANSFORMS["grad"], TRANSFORMS["hessian"]):
        torch.testing.assert_close(derivative(exported, input), derivative(layer, input), rtol=1e-4, atol=1e-5)


def test_forward_mode_through_an_exported_branch_norm_is_refused():
    layer = AutofocusConv2d(2, 3, dilations=(1, 2), branch_norm=True)
    input = torch.randn(2, 2, 5, 6)
    exported = torch.export.export(layer, (input,)).module()
    with pytest.raises(RuntimeError, match="forward mode AD"):
        jvp(exported, (input,), (input,))


def test_export_of_the_reference_is_plain_convolutions():
    class Naive(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, 3, 3))

        def forward(self, input, attention):
            return reference.autofocus_conv(input, self.weight, attention, dilations=(1, 2))

    arguments = (torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5, 6))
    program = torch.export.export(Naive(), arguments)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("autofocus" in target for target in targets)
    assert any("conv2d" in target for target in targets)


@pytest.mark.parametrize(
    "Layer, settings",
    [(AutofocusConv1d, {"stride": 2, "padding": 1}), (AutofocusConv2d, {}), (AutofocusConv3d, {"branch_norm": True})],
)
def test_an_exported_layer_decomposes_to_aten(Layer, settings):
    layer = Layer(2, 3, dilations=(1, 2, 4), **settings).eval()
    for norm in layer.branch_norm or ():
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 2, 3)
    size = (5, 6, 4)[: layer.spatial_dims]
    dynamic = (dict.fromkeys((0, *range(2, 2 + layer.spatial_dims)), torch.export.Dim.AUTO),)
    program = torch.export.export(layer, (torch.randn(2, 2, *size),), dynamic_shapes=dynamic)
    program = program.run_decompositions(decompositions())
    operators = [node.target for node in program.graph.nodes if node.op == "call_function"]
    called = [target for target in operators if isinstance(target, torch._ops.OpOverload)]
    assert {target.namespace for target in called} == {"aten"}
    assert sum("conv" in str(target) for target in called) == 3 + 2  # the branches and the gate
    for shape in ((2, 2, *size), (1, 2, *(length + 3 for length in size))):
        input = torch.randn(shape)
        torch.testing.assert_close(program.module()(input), layer(input))


# ------------------------------------------------------------------ autocast


def cast(arguments, dtype):
    return {name: tensor.to(dtype) for name, tensor in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_autocast_casts_as_for_a_convolution(backend, case, dtype):
    arguments = testing.make_tensors(case, requires_grad=True).arguments()
    with torch.autocast("cpu", dtype=dtype):
        output = autofocus_conv(**arguments, **case.options, backend=backend)
    assert output.dtype == dtype
    expected = autofocus_conv(**cast(arguments, dtype), **case.options, backend=backend)
    assert torch.equal(output, expected)
    output.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in arguments.values())


def test_autocast_takes_mixed_dtypes(backend):
    """Under autocast the gate often comes in bfloat16 and the parameters in float32."""
    case = CASES[0]
    arguments = testing.make_tensors(case).arguments()
    mixed = {**arguments, "attention": arguments["attention"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = autofocus_conv(**mixed, **case.options, backend=backend)
    expected = autofocus_conv(**cast(arguments, torch.bfloat16), **case.options, backend=backend)
    assert torch.equal(output, expected)


def test_autocast_leaves_float64(backend):
    arguments = testing.make_tensors(CASES[0], torch.float64).arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autofocus_conv(**arguments, **CASES[0].options, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["image", "features"])
def test_autocast_of_the_layer_trains_float32_parameters(backend, dtype):
    """On an image, and on what the layer before it gives."""
    layer = AutofocusConv2d(3, 4, dilations=(1, 2), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, attention = layer(torch.randn(2, 3, 5, 6, dtype=dtype), return_attention=True)
    assert output.dtype == attention.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_autocast_under_compile(backend):
    case = CASES[0]
    arguments = testing.make_tensors(case).arguments()
    compiled = torch.compile(partial(autofocus_conv, backend=backend), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = compiled(**arguments, **case.options)
        assert torch.equal(output, autofocus_conv(**arguments, **case.options, backend=backend))


def test_a_traced_layer_holds_the_operator():
    """torch.jit.trace sees operators and not Python, as an autograd.Function would be."""
    layer, input = AutofocusConv2d(2, 3, dilations=(1, 2)), torch.randn(1, 2, 6, 7)
    traced = torch.jit.trace(layer, (input,))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert "autofocus::forward" in kinds and "prim::PythonOp" not in kinds
    torch.testing.assert_close(traced(input), layer(input))


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_holds_the_operator(pre_dispatch):
    """Not the kernel that this machine happens to run, through which no gradient comes."""
    # Without a detach, which torch 2.14 writes as an alias.
    layer, input = AutofocusConv2d(2, 3, dilations=(1, 2), detach_attention=False), torch.randn(1, 2, 6, 7)
    graph = make_fx(layer, pre_dispatch=pre_dispatch)(input)
    assert torch.ops.autofocus.forward.default in {node.target for node in graph.graph.nodes}
    torch.testing.assert_close(graph(input), layer(input))
    torch.testing.assert_close(grad(lambda t: graph(t).sum())(input), grad(lambda t: layer(t).sum())(input))


def test_torch_jit_script_is_refused_with_what_to_use():
    network = nn.Sequential(nn.ReLU(), AutofocusConv2d(2, 3, branch_norm=True))
    with pytest.raises(RuntimeError, match="torch.jit.script cannot read AutofocusConv2d: use torch.jit.trace"):
        torch.jit.script(network)
