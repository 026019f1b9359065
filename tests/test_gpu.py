"""The GPU backends on a GPU; benchmarks/gpu_check.py runs this file. Without a GPU there is nothing to run it on."""

from functools import partial

import pytest
import torch
from helpers import plain_norms as layers
from helpers.dead_context import a_dead_context_ends_the_process  # noqa: F401, a fixture

from autofocus_kernels import AutofocusConv3d, autofocus_conv, reference, self_check, testing, tolerance
from autofocus_kernels.branch_norm import normed_autofocus_conv
from autofocus_kernels.dispatch import PREFERENCE, backend_named
from autofocus_kernels.testing import Case

DEVICE = "cuda"
BACKENDS = [name for name in PREFERENCE[DEVICE] if name != "reference"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = backend_named(request.param).unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def exact_float32():
    """The tolerances are those of float32; tests of TF32 switch it on."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def results_of(backend, case, tensors):
    with testing.poisoned_memory():
        return testing.evaluate(partial(autofocus_conv, backend=backend), case, tensors)


def skip_if_refused(backend, case, dtype):
    """Only where the backend says so beforehand; whatever it takes it must get right."""
    reason = backend_named(backend).refusal(testing.call_of(case, testing.make_tensors(case, dtype, DEVICE)))
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_truth(backend, case, dtype):
    skip_if_refused(backend, case, dtype)
    testing.check(backend, case, dtype, DEVICE)


# More than one tile on every axis and several blocks of channels: where the fast kernels differ from the simple ones.
LARGER = (
    Case("larger", (37, 33, 41), 32, 32, dilations=(2, 6, 10, 14)),
    Case("larger_valid", (35, 38, 33), 40, 50, dilations=(2, 6, 10, 14), padding="valid"),
    Case("larger_branch", (35, 38, 33), 30, 40, dilations=(2, 6, 10, 14), padding="valid", mode="branch"),
    Case("larger_channels_last", (34, 39, 35), 64, 64, dilations=(2, 6, 10, 14), layout="channels_last"),
    Case("larger_batch", (19, 24, 21), 48, 33, batch=3, dilations=(1, 2, 3)),
    Case("larger_2d", (97, 130), 64, 64, batch=2, dilations=(2, 6, 10, 14)),
    Case("larger_1d", (3001,), 24, 40, batch=2, dilations=(1, 4, 9)),
    Case("large_dilations", (70, 66, 65), 16, 16, dilations=(3, 30, 33)),
    # Tiles for fourteen rounds of an H100: the windows' forward takes it in two parts, the backward in four.
    Case("in_parts", (130, 66, 70), 8, 9, dilations=(2, 6, 10, 14)),
    # Tiles for three rounds, and nothing to cut by but slabs of the gradient of the input.
    Case("in_slabs", (66, 48, 50), 8, 9, dilations=(1, 2, 3, 4)),
)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_truth_over_many_tiles(backend, case, dtype):
    skip_if_refused(backend, case, dtype)
    testing.check(backend, case, dtype, DEVICE)


@pytest.mark.parametrize("case", LARGER, ids=str)
def test_tf32_is_within_twice_the_error_of_pytorch(backend, case):
    torch.backends.cudnn.allow_tf32 = True
    tensors = testing.make_tensors(case, torch.float32, DEVICE)
    expected = testing.truth(case, tensors)
    same_precision = testing.evaluate(reference.autofocus_conv, case, tensors)
    for name, result in results_of(backend, case, tensors).items():
        allowed = tolerance.of_tf32(testing.relative_error(same_precision[name], expected[name]))
        assert testing.relative_error(result, expected[name]) <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", LARGER[:4], ids=str)
def test_repeats_bit_for_bit(backend, case, dtype):
    tensors = testing.make_tensors(case, dtype, DEVICE)
    first = results_of(backend, case, tensors)
    for _ in range(5):
        for name, result in results_of(backend, case, tensors).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize("mode", ["plain", "branch"])
def test_gradcheck_in_float64(mode):
    """Only the cuda backend takes float64."""
    reason = backend_named("cuda").unavailable()
    if reason is not None:
        pytest.skip(f"backend cuda: {reason}")
    case = Case("gradcheck", (4, 5, 3), 2, 3, dilations=(1, 2), mode=mode, batch=2)
    tensors = testing.make_tensors(case, torch.float64, DEVICE, requires_grad=True)
    names, values = zip(*tensors.arguments().items())

    def function(*arguments):
        return autofocus_conv(**dict(zip(names, arguments)), **case.options, backend="cuda")

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


def test_another_stream(backend):
    """Work is queued on the current stream: what that stream computed before is seen, what it computes next waits."""
    case = LARGER[0]
    tensors = testing.make_tensors(case, torch.bfloat16, DEVICE)
    expected = results_of(backend, case, tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = tensors._replace(input=tensors.input.clone())
        results = results_of(backend, case, late)
    stream.synchronize()
    for name in expected:
        assert torch.equal(results[name], expected[name]), name


def test_cuda_graph(backend):
    case = LARGER[0]
    tensors = testing.make_tensors(case, torch.bfloat16, DEVICE)
    arguments = {name: tensor.requires_grad_() for name, tensor in tensors.arguments().items()}

    def step():
        output = autofocus_conv(**arguments, **case.options, backend=backend)
        return output, *torch.autograd.grad(output, list(arguments.values()), tensors.grad_output)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels compile and libraries load outside the capture
        for _ in range(2):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors.input.copy_(torch.randn_like(tensors.input))
    graph.replay()
    for captured_tensor, eager in zip(captured, step()):
        assert torch.equal(captured_tensor, eager)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_wrong_kernel_is_refused(backend, dtype, monkeypatch):
    """Also under TF32, which the truth does not depend on; in a graph that is captured nothing is checked."""
    case = Case("wrong", (37, 33, 41), 32, 32, dilations=(2, 6, 10, 14), layout="channels_last")
    forward = backend_named(backend).forward

    def wrong(call, output):
        forward(call, output)
        output[-1, -1, -1, -1, -1] += 0.2 * output.abs().max()

    tensors = testing.make_tensors(case, dtype, DEVICE)
    for tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = tf32
        self_check.forget()
        results_of(backend, case, tensors)
        assert "2 right, 0 wrong, 0 not checked" in self_check.report()[0]
        self_check.forget()
        with monkeypatch.context() as patch:
            patch.setattr(backend_named(backend), "forward", wrong)
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                autofocus_conv(**tensors.arguments(), **case.options, backend=backend)
            with pytest.raises(RuntimeError, match="its self-check fails, forward"):
                autofocus_conv(**tensors.arguments(), **case.options, backend=backend)
    self_check.forget()


def test_second_gpu(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    testing.check(backend, LARGER[0], torch.bfloat16, "cuda:1")


def test_compiled(backend):
    case = LARGER[0]
    tensors = testing.make_tensors(case, torch.bfloat16, DEVICE)
    function = torch.compile(partial(autofocus_conv, backend=backend), fullgraph=True)
    compiled = testing.evaluate(function, case, tensors)
    eager = testing.evaluate(partial(autofocus_conv, backend=backend), case, tensors)
    for name in eager:
        assert torch.equal(compiled[name], eager[name]), name


def test_more_than_2_to_the_31_elements(backend):
    """Offsets beyond 32 bits: the last voxels of a long volume are those of a short one cut from its end."""
    channels, length, rows = 8, 4200, (256, 257)
    needed = 3 * 2 * channels * length * rows[0] * rows[1]
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    dilations, tail = (2, 6), 20
    input = torch.empty(1, channels, length, *rows, dtype=torch.bfloat16, device=DEVICE)
    assert input.numel() > 2**31
    for plane in input[0].split(1):
        plane.normal_()
    weight = torch.randn(8, channels, 3, 3, 3, dtype=torch.bfloat16, device=DEVICE) / 15
    attention = torch.rand(1, 2, 1, 1, 1, dtype=torch.bfloat16, device=DEVICE)
    gate = attention.expand(1, 2, length, *rows)
    with torch.no_grad():
        output = autofocus_conv(input, weight, gate, dilations=dilations, backend=backend)
        cut = input[:, :, -tail:]
        exact = reference.autofocus_conv(
            cut.double(), weight.double(), gate[:, :, -tail:].double(), dilations=dilations
        )
    # Of the cut, the last planes read nothing that was cut off.
    error = testing.relative_error(output[:, :, -tail + 6 :], exact[:, :, 6:])
    assert error < 0.01


@pytest.mark.parametrize("dtype, save_branches", list(zip(DTYPES, (False, True, False, True))), ids=str)
@pytest.mark.parametrize("case", [case for case in (*layers.CASES, *LARGER) if case.mode == "plain"], ids=str)
def test_training_step_with_branch_norm(backend, case, dtype, save_branches):
    """Output, all gradients and running statistics, against the layer written out."""
    skip_if_refused(backend, case, dtype)
    if dtype == torch.float64:
        tensors, norms = testing.make_tensors(case, dtype, DEVICE), layers.make_norms(case, dtype, DEVICE)
        layers.assert_same(*layers.run_both(case, tensors, norms, backend, save_branches=save_branches))
    else:
        tensors, norms = testing.make_tensors(case, dtype, DEVICE), layers.make_norms(case, torch.float32, DEVICE)
        function = partial(normed_autofocus_conv, save_branches=save_branches, backend=backend)
        layers.compare(function, case, tensors, norms)


def test_cuda_graph_of_branch_norm(backend):
    torch.manual_seed(0)
    layer = AutofocusConv3d(16, 24, dilations=(2, 6, 10), branch_norm=True, bias=False, device=DEVICE, backend=backend)
    input = torch.randn(2, 16, 17, 19, 18, device=DEVICE, requires_grad=True)

    def step():
        output = layer(input)
        return output, *torch.autograd.grad(output.square().sum(), [input, *layer.parameters()])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels compile and libraries load outside the capture
        for _ in range(2):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        input.copy_(torch.randn_like(input))
    graph.replay()
    for captured_tensor, eager in zip(captured, step()):
        assert testing.relative_error(captured_tensor, eager) < 1e-4


def test_layer_with_branch_norm_trains_as_on_the_reference(backend):
    torch.manual_seed(0)
    layer = AutofocusConv3d(16, 24, dilations=(2, 6, 10), branch_norm=True, device=DEVICE)
    input = torch.randn(2, 16, 17, 19, 18, device=DEVICE)
    gradients = {}
    for name in (backend, "reference"):
        layer.backend = name
        layer.zero_grad()
        layer(input).square().mean().backward()
        gradients[name] = {key: parameter.grad.clone() for key, parameter in layer.named_parameters()}
    for key, expected in gradients["reference"].items():
        if key != "bias":  # batch normalisation takes the mean away again: its gradient is rounding
            assert testing.relative_error(gradients[backend][key], expected) < 1e-3, key
