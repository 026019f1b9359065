"""A backend that is wrong is found out at its first use, and another takes its calls. Planted on CPU tensors."""

import dataclasses
import inspect
import logging
import math
import threading
import time

import pytest
import torch
from helpers.plain_norms import evaluate as evaluate_norm
from helpers.plain_norms import make_norms

import autofocus_kernels as ak
from autofocus_kernels import dispatch, self_check, testing
from autofocus_kernels.backends.interface import Backend, CannotRun
from autofocus_kernels.backends.reference import backend as reference
from autofocus_kernels.branch_norm import normed_autofocus_conv
from autofocus_kernels.testing import Case

FUNCTIONS = [name for name, _ in inspect.getmembers(Backend, inspect.isfunction) if name in self_check._READ]
BRANCH = Case("branch", (6, 7), dilations=(1, 2), mode="branch")
PLAIN = Case("plain", (6, 7), dilations=(1, 2))


class Planted:
    """The reference, but ``wrong`` (function, tensors filled -> None) may alter what a function filled."""

    checked, tiles_by_volume = True, False

    def __init__(self, wrong=None):
        self.wrong = wrong
        self.calls = []  # (function, call) of every one

    def unavailable(self):
        return None

    def refusal(self, call):
        return None

    def run(self, function, call, *arguments):
        self.calls.append((function, call))
        getattr(reference, function)(call, *arguments)
        if self.wrong is not None:
            first = len(self_check._READ[function])
            self.wrong(function, arguments[1] if function == "backward" else arguments[first:])

    def __getattr__(self, function):
        if function not in FUNCTIONS:
            raise AttributeError(function)
        return lambda *arguments: self.run(function, *arguments)

    def count(self, function):
        return [name for name, _ in self.calls].count(function)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch.log_refusal.cache_clear()
    self_check.forget()
    yield
    self_check.forget()


@pytest.fixture
def said(caplog):
    """A function that gives the package's messages so far."""
    caplog.set_level(logging.DEBUG, logger="autofocus_kernels")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "autofocus_kernels"]


@pytest.fixture
def plant(monkeypatch):
    """Puts a backend in the place of the cpu backend."""
    named = dispatch.backend_named

    def planted(backend):
        monkeypatch.setattr(dispatch, "backend_named", lambda name: backend if name == "cpu" else named(name))
        return backend

    return planted


def spoil(function, index):
    """One element of what ``function`` fills is off by a tenth of the largest."""

    def wrong(name, filled):
        if name == function:
            flat = filled[index].view(-1)
            flat[len(flat) // 2] += 0.1 * flat.abs().max()

    return wrong


def call(case=PLAIN, dtype=torch.float32, **options):
    return ak.autofocus_conv(**testing.make_tensors(case, dtype).arguments(), **case.options, **options)


def train_norm(case=PLAIN, dtype=torch.float32, save_branches=False, backend=None):
    tensors, norms = testing.make_tensors(case, dtype), make_norms(case, torch.float32)

    def function(*arguments, **options):
        return normed_autofocus_conv(*arguments, **options, save_branches=save_branches, backend=backend)

    return evaluate_norm(function, case, tensors, norms)


# ------------------------------------------------------------------ what is wrong is refused

FILLED = [(function, index) for function in FUNCTIONS for index in range(len(self_check._FILLED[function]))]
FILLED.remove(("branch_norm_backward", 0))  # memory to work in


def test_every_function_of_a_backend_is_known():
    assert set(FUNCTIONS) == {
        name for name, _ in inspect.getmembers(Backend, inspect.isfunction) if not name.startswith("_")
    } - {"unavailable", "refusal"}
    for function in FUNCTIONS:
        names = [*self_check._READ[function], *self_check._FILLED[function]]
        if function != "backward":
            parameters = list(inspect.signature(getattr(Backend, function)).parameters)[2:]
            assert [name.removeprefix("grad_") for name in parameters] == [n.removeprefix("grad_") for n in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function, index", FILLED)
def test_one_wrong_element_is_refused_and_the_next_backend_is_right(plant, said, function, index, dtype):
    def run():
        if function.startswith("branch_"):
            return train_norm(PLAIN, dtype, save_branches=True)
        return testing.evaluate(ak.autofocus_conv, BRANCH, testing.make_tensors(BRANCH, dtype))

    planted = plant(Planted(spoil(function, index)))
    results = [run() for _ in range(2)]
    (message,) = said()
    wrong = self_check._FILLED[function][index]
    assert message.startswith(f"backend 'cpu' is not used: its self-check fails, {function} (")
    assert f": {wrong} is off by" in message and message.count("is off by") == 1
    assert planted.count(function) == 1  # in the check only
    planted.wrong, planted.checked = None, False
    expected = run()
    for result in results:
        assert all(torch.equal(result[name], expected[name]) for name in expected)


def _with_geometry(call, **changed):
    return call._replace(geometry=dataclasses.replace(call.geometry, **changed))


def _without(tensor, *window):
    tensor = tensor.clone()
    tensor[window] = 0
    return tensor


# What a kernel gets wrong: call -> the call that it computes instead.
MISTAKES = {
    "a dilation off by one": lambda call: _with_geometry(call, dilations=(*call.geometry.dilations[:-1], (15, 15))),
    "branches exchanged": lambda call: call._replace(attention=call.attention.flip(1)),
    "every sample the first": lambda call: call._replace(input=call.input[:1].expand_as(call.input)),
    "bias forgotten": lambda call: call._replace(bias=None),
    "the last input channel forgotten": lambda call: call._replace(input=_without(call.input, slice(None), -1)),
    "a tap of a channel forgotten": lambda call: call._replace(weight=_without(call.weight, 7, slice(None), 0, 0)),
    "the last column read as zeros": lambda call: call._replace(input=_without(call.input, ..., -1)),
    "kernel flipped": lambda call: call._replace(weight=call.weight.flip(-1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_kernels_are_refused(plant, said, mistake, dtype):
    case = Case("wide", (40, 44), 32, 32, dilations=(2, 6, 14), layout="channels_last")
    planted = plant(Planted())
    planted.run = lambda function, call, *arguments: getattr(reference, function)(MISTAKES[mistake](call), *arguments)
    call(case, dtype)
    (message,) = said()
    assert "output is off by" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_nan_is_refused(plant, dtype):
    plant(Planted(lambda function, filled: filled[0].view(-1)[3].fill_(math.nan)))
    assert not call(dtype=dtype).isnan().any()


def test_what_is_not_filled_is_refused(plant, said):
    planted = plant(Planted())
    planted.run = lambda *_: None
    assert torch.equal(call(), call(backend="reference"))
    assert "output is off by nan" in said()[0]


def test_an_error_is_a_refusal(plant, said):
    def fail(function, filled):
        raise ZeroDivisionError("no tiles")

    plant(Planted(fail))
    assert torch.equal(call(), call(backend="reference"))
    assert "ZeroDivisionError: no tiles" in said()[0]


def test_an_error_that_ends_the_use_of_the_gpu_names_the_backend(plant, monkeypatch, said):
    def fail(function, filled):
        raise RuntimeError("an illegal memory access was encountered")

    plant(Planted(fail))
    monkeypatch.setattr(self_check, "_lost", lambda device: True)
    with pytest.raises(RuntimeError, match="of backend 'cpu' has ended .* illegal memory access .* AUTOFOCUS_BACKEND"):
        call()
    assert not said()


def test_what_the_gpu_answers_after_an_error_says_whether_it_is_lost(monkeypatch):
    def synchronize(device):
        if device.index == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert [self_check._lost(torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")] == [False, False, True]


def test_bfloat16_arithmetic_is_refused_in_float32(plant, said):
    plant(Planted(lambda function, filled: filled[0].copy_(filled[0].bfloat16())))
    call()
    assert "output is off by" in said()[0]


def test_a_backend_that_refuses_is_not_checked_and_not_run(plant, said):
    planted = plant(Planted())
    planted.refusal = lambda call: "it is Sunday"
    call()
    assert not planted.calls and said() == ["backend 'cpu' is not used: it is Sunday"]


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_forced_backend_that_is_wrong_is_an_error(plant, monkeypatch, by):
    plant(Planted(spoil("forward", 0)))
    if by == "environment":
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cpu")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="'cpu' cannot run this call: its self-check fails, forward .*off by"):
            call(backend="cpu" if by == "argument" else None)


def test_only_the_wrong_function_is_refused(plant):
    planted = plant(Planted(spoil("backward", 1)))
    tensors = testing.make_tensors(PLAIN)
    testing.judge(testing.evaluate(ak.autofocus_conv, PLAIN, tensors), PLAIN, tensors)
    assert planted.count("forward") == 2 and planted.count("backward") == 1


# ------------------------------------------------------------------ what is right passes, and is checked once


@pytest.fixture
def checked_cpu(monkeypatch):
    """The cpu backend, whose sums are ordered and rounded otherwise than the reference's, is checked."""
    cpu = dispatch.backend_named("cpu")
    if cpu.unavailable() is not None:
        pytest.skip(f"backend cpu: {cpu.unavailable()}")
    monkeypatch.setattr(cpu, "checked", True)


# The reference needs seconds for the widest in 16 bits.
DTYPES_OF_CASES = [
    (case, dtype)
    for case in testing.CASES
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if case.channels * case.out_channels < 1000 or dtype == torch.float32
]


@pytest.mark.parametrize("case, dtype", DTYPES_OF_CASES, ids=str)
def test_right_backends_pass(checked_cpu, said, case, dtype):
    testing.evaluate(ak.autofocus_conv, case, testing.make_tensors(case, dtype))
    assert not said() and "2 right, 0 wrong, 0 not checked" in ak.show_config()


@pytest.mark.parametrize("save_branches", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_branch_norms_pass(checked_cpu, said, dtype, save_branches):
    for case in (PLAIN, Case("last", (5, 4, 6), dilations=(1, 2), layout="channels_last", batch=2)):
        train_norm(case, dtype, save_branches)
    kinds = 4 if save_branches else 5  # the backward computes branches without statistics
    assert not said() and f"{2 * kinds} right, 0 wrong, 0 not checked" in ak.show_config()


def test_a_kind_is_checked_once(plant):
    planted = plant(Planted())
    for _ in range(3):
        call()
    assert planted.count("forward") == 3 + 1


def test_a_known_call_builds_no_small_problem(plant, monkeypatch):
    plant(Planted())
    call()
    monkeypatch.setattr(self_check, "_small", None)
    call()


@pytest.mark.parametrize("tiles_by_volume", [False, True])
def test_large_volumes_share_a_check_unless_tiles_depend_on_them(plant, tiles_by_volume):
    planted = plant(Planted())
    planted.tiles_by_volume = tiles_by_volume
    for size in ((70, 71), (71, 75)):
        call(Case("large", size, channels=1, out_channels=1, dilations=(1, 2)))
    assert planted.count("forward") == 2 + (2 if tiles_by_volume else 1)


OTHER_KINDS = (
    Case("dilations", (6, 7), dilations=(1, 3)),
    Case("branches", (6, 7), dilations=(1, 2, 3)),
    Case("channels", (6, 7), dilations=(1, 2), channels=3),
    Case("out_channels", (6, 7), dilations=(1, 2), out_channels=6),
    Case("kernel", (6, 7), dilations=(1, 2), kernel_size=(1, 3)),
    Case("stride", (6, 7), dilations=(1, 2), stride=2, padding=1),
    Case("padding", (6, 7), dilations=(1, 2), padding=3),
    Case("dims", (6, 7, 1), dilations=(1, 2)),
    Case("no_bias", (6, 7), dilations=(1, 2), bias=False),
    Case("scale", (6, 7), dilations=(1, 2), mode="scale"),
    Case("channels_last", (6, 7), dilations=(1, 2), layout="channels_last"),
    Case("transposed", (6, 7), dilations=(1, 2), layout="transposed"),
)


@pytest.mark.parametrize("case", OTHER_KINDS, ids=str)
def test_other_kernels_are_other_kinds(plant, case):
    planted = plant(Planted())
    call()
    call(case)
    assert planted.count("forward") == 2 + 2


def test_another_dtype_is_another_kind(plant):
    planted = plant(Planted())
    call()
    call(dtype=torch.bfloat16)
    assert planted.count("forward") == 2 + 2


def test_other_gradients_are_another_kind(plant):
    planted = plant(Planted())
    for wanted in (["input"], ["weight"], ["input", "weight"], ["weight"]):
        arguments = testing.make_tensors(PLAIN).arguments()
        for name in wanted:
            arguments[name].requires_grad_()
        ak.autofocus_conv(**arguments, **PLAIN.options).sum().backward()
    assert planted.count("backward") == 4 + 3


@pytest.mark.parametrize("wrong", [None, spoil("forward", 0)], ids=["right", "wrong"])
def test_threads_wait_for_one_check(plant, wrong):
    planted, expected = plant(Planted(wrong)), call(backend="reference")
    together, results = threading.Barrier(4), []
    run = planted.run

    def slow(*arguments):
        time.sleep(0.05)  # so that the others come while it is checked
        run(*arguments)

    def work():
        together.wait()
        results.append(call())

    planted.run = slow
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)
    assert planted.count("forward") == (1 + 4 if wrong is None else 1)


# ------------------------------------------------------------------ what cannot be checked, or not now


def test_nothing_is_checked_while_a_graph_is_captured(plant, monkeypatch):
    planted = plant(Planted(spoil("forward", 0)))
    monkeypatch.setattr(self_check, "capturing", lambda device: True)
    assert not torch.equal(call(), call(backend="reference"))
    assert planted.count("forward") == 1
    monkeypatch.undo()
    plant(planted)
    assert torch.equal(call(), call(backend="reference"))


def test_what_is_known_is_refused_while_a_graph_is_captured(plant, monkeypatch):
    plant(Planted(spoil("forward", 0)))
    call()
    monkeypatch.setattr(self_check, "capturing", lambda device: True)
    assert torch.equal(call(), call(backend="reference"))


def test_a_small_problem_that_cannot_run_says_nothing_about_the_call(plant, said):
    planted = plant(Planted())
    run = planted.run

    def once(*arguments):
        planted.run = run
        raise CannotRun("no tile fits")

    planted.run = once
    call()
    assert planted.count("forward") == 1 and not said()
    assert "0 right, 0 wrong, 1 not checked" in ak.show_config()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])  # of torch, and of a compiled library
def test_out_of_memory_is_not_held_against_a_kernel(plant, said, kind):
    def fail(function, filled):
        planted.wrong = None
        raise kind("out of memory: torch gives no 8 bytes of scratch memory")

    planted = plant(Planted(fail))
    call()
    assert planted.count("forward") == 2 and not said()
    call()
    assert planted.count("forward") == 4  # the next call was checked


def test_a_failing_reference_is_said_once_and_the_backend_runs(plant, monkeypatch, said):
    planted = plant(Planted())

    def fail(variant, call, read):
        raise NotImplementedError("no such convolution")

    monkeypatch.setattr(self_check, "_truth", fail)
    for _ in range(2):
        call()
    assert planted.count("forward") == 2
    (message,) = said()
    assert "runs without a self-check, forward" in message and message.endswith("fails: no such convolution")


def test_a_check_within_a_check_is_none(plant, monkeypatch):
    """A function of a backend that calls another through dispatch."""
    planted, depths, check = plant(Planted()), [0], self_check._check
    run = planted.run

    def calls_forward(function, call, *arguments):
        if function == "branch_statistics":
            dispatch.run("forward", call, torch.empty_like(arguments[0][0]))
        run(function, call, *arguments)

    def counted(*arguments):
        depths.append(depths[-1] + 1)
        outcome = check(*arguments)
        depths.append(depths[-1] - 1)
        return outcome

    planted.run = calls_forward
    monkeypatch.setattr(self_check, "_check", counted)
    train_norm(save_branches=True)
    assert max(depths) == 1 and depths[-1] == 0
    assert planted.count("forward") == 1 + 2  # in the check of the other; then checked itself, and run


# ------------------------------------------------------------------ the user's state


def test_random_state_is_left_alone(plant):
    plant(Planted())
    before = torch.get_rng_state()
    call()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [None, spoil("forward", 0)], ids=["right", "wrong"])
def test_inference_mode_before_training(plant, wrong):
    plant(Planted(wrong))
    with torch.inference_mode():
        call()
    tensors = testing.make_tensors(PLAIN)
    testing.judge(testing.evaluate(ak.autofocus_conv, PLAIN, tensors), PLAIN, tensors)


@pytest.mark.parametrize("wrong", [None, spoil("forward", 0)], ids=["right", "wrong"])
def test_autocast(plant, wrong, said):
    seen, planted = [], plant(Planted(wrong))
    run = planted.run
    planted.run = lambda *arguments: (seen.append(torch.is_autocast_enabled("cpu")), run(*arguments))
    with torch.autocast("cpu", torch.bfloat16):
        output = call()
        assert torch.is_autocast_enabled("cpu")
    assert output.dtype == torch.bfloat16 and seen[0] is False
    assert bool(said()) == (wrong is not None)


@pytest.mark.parametrize("searches", [True, False])
def test_cudnn_searches_for_no_convolution_of_the_truth(plant, monkeypatch, searches):
    seen, forward = [], reference.forward

    def recorded(*arguments):
        seen.append(torch.backends.cudnn.benchmark)
        forward(*arguments)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", searches)
    monkeypatch.setattr(reference, "forward", recorded)
    plant(Planted())
    call()
    assert seen == [False, searches, searches]  # the truth, the check, the call


def test_deterministic_mode_and_default_dtype(plant, said):
    plant(Planted())
    tensors = testing.make_tensors(PLAIN)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    try:
        testing.judge(testing.evaluate(ak.autofocus_conv, PLAIN, tensors), PLAIN, tensors)
        assert torch.are_deterministic_algorithms_enabled() and not said()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_under_functorch_and_compile(plant, said):
    planted = plant(Planted())
    tensors = testing.make_tensors(PLAIN)

    def function(weight):
        return ak.autofocus_conv(tensors.input, weight, tensors.attention, **PLAIN.options).square().sum()

    weights = torch.stack([tensors.weight, 2 * tensors.weight])
    for each in torch.vmap(torch.func.grad(function))(weights), torch.vmap(torch.func.grad(function))(weights):
        assert not each.isnan().any()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tensors.weight), function(tensors.weight))
    assert planted.calls and not said()


LAID_OUT = [case for case in testing.CASES if case.name.startswith(("channels_last", "transposed", "expanded"))]


@pytest.mark.parametrize("case", LAID_OUT, ids=str)
def test_the_small_problem_lies_in_memory_as_the_call(plant, case):
    planted = plant(Planted())
    call(case)
    (_, small), (_, real) = planted.calls
    for ours, theirs in zip(small[:6], real[:6]):
        if theirs is not None:
            assert self_check._layout(ours) == self_check._layout(theirs)


@pytest.mark.parametrize(
    "tensor, order, expanded",
    [
        (torch.empty(2, 3, 4, 5), (0, 1, 2, 3), ()),
        (torch.empty(1, 4, 5, 3).movedim(-1, 1), (0, 2, 3, 1), ()),
        (torch.empty(3, 4, 5, 1).movedim(-1, 0), (0, 1, 2, 3), ()),
        (torch.empty(3, 4, 5, 2).movedim(-1, 0), (1, 2, 3, 0), ()),
        (torch.empty(3, 4, 5).expand(2, 3, 4, 5), (1, 2, 3, 0), (0,)),
        (torch.empty(()).expand(1, 1, 4, 5), (0, 1, 2, 3), (2, 3)),
    ],
    ids=["contiguous", "channels last", "one sample innermost", "samples innermost", "expanded", "one value"],
)
def test_layouts(tensor, order, expanded):
    """The stride of a single sample says nothing, nor is an axis of size one expanded: the small problem has more."""
    assert self_check._layout(tensor) == (order, expanded)


@pytest.mark.parametrize("save_branches", [False, True])
def test_gradients_overwrite_branches_in_the_check_as_in_the_call(plant, save_branches):
    planted, overwritten = plant(Planted()), []
    run = planted.run

    def recorded(function, call, *arguments):
        if function == "branch_norm_backward":
            overwritten.append(arguments[5].data_ptr() == arguments[1].data_ptr())
        run(function, call, *arguments)

    planted.run = recorded
    train_norm(save_branches=save_branches)
    assert overwritten == 2 * [not save_branches]


def test_tf32_holds_the_operands_of_the_truth(plant):
    """So the truth does not depend on whether convolutions and matrix products may round to it."""

    def held(tensor):
        return not (tensor.contiguous().view(torch.int32) & 0x1FFF).any()  # 10 bits of the mantissa's 23

    plant(Planted())
    testing.evaluate(ak.autofocus_conv, BRANCH, testing.make_tensors(BRANCH))
    train_norm()
    for variant in self_check._outcomes:
        values, read = self_check._values(variant)
        assert all(held(tensor) for tensor in (*values[:6], *read.values()) if tensor is not None)
        if "grad_output" in read:
            gated = read["grad_output"] * values.attention[:, :1]
            assert held(gated)
            if values.branch_scale is not None:
                assert held(gated * values.branch_scale[0].view(-1, 1, 1))
    assert not held(torch.randn(100))


def test_tf32_has_a_limit_of_its_own(plant):
    def round_to_tf32(function, filled):
        filled[0].view(torch.int32).bitwise_and_(~0x1FFF)

    plant(Planted())
    call()
    (variant,) = self_check._outcomes
    verdicts = [self_check._check(variant._replace(tf32=tf32), Planted(round_to_tf32)).verdict for tf32 in (0, 1)]
    assert verdicts == ["wrong", "right"]


# ------------------------------------------------------------------ the small problem's size

SIZES = (
    *testing.CASES,
    Case("afn", (71, 67, 75), 40, 50, dilations=(2, 6, 10, 14)),
    Case("multiples", (64, 64, 64), 32, 32, dilations=(2, 6, 10, 14)),
    Case("valid_multiples", (68, 64, 67), 32, 32, dilations=(2, 6, 10, 14), padding="valid"),
    Case("wide", (64, 64, 64), 512, 512, dilations=(2, 6, 10, 14)),
    Case("long", (10**6,), dilations=(1, 1000)),
    Case("strided", (200, 300), dilations=(1, 2), stride=(2, 5), padding=1),
    Case("far", (2**20, 3), dilations=(1, 2**40), kernel_size=(3, 1)),
    Case("valid_far", (5000,), dilations=(1200, 2000), padding="valid"),
    Case("valid_wide", (64, 64, 64), 512, 512, dilations=(8, 9), padding="valid"),  # nearest to a volume with no output
)


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_small_problems_are_small_and_similar(case):
    real = case.geometry
    small = self_check._small(real, case.channels, case.out_channels, True)
    assert small.tiled == real
    for axis, (size, output) in enumerate(zip(small.input_size, small.output_size)):
        assert output == -(-(size - 2 * small.origin[axis]) // small.stride[axis]) > 0
        assert 0 < size <= real.input_size[axis]
        if size < real.input_size[axis]:
            assert (size % 16 == 0) == (real.input_size[axis] % 16 == 0)
            assert (output % 16 == 0) == (real.output_size[axis] % 16 == 0)
    if math.prod(real.input_size) > 10 * self_check.VOXELS:
        voxels = math.prod(small.output_size)
        assert voxels <= 64 * 1024  # after rounding to or from a multiple of 16
        work = self_check.BATCH * voxels * real.num_branches * real.num_taps * case.channels * case.out_channels
        assert work <= 8 * self_check.MOST_WORK


@pytest.mark.parametrize("channels", [32, 40, 64])
def test_some_voxels_read_within_the_volume_only(channels):
    geometry = Case("afn", (71, 67, 75), dilations=(2, 6, 10, 14)).geometry
    small = self_check._small(geometry, channels, channels, False)
    assert min(small.input_size) > 2 * 14


# ------------------------------------------------------------------ what is said of it


def test_show_config_says_what_was_found(plant):
    assert "nothing yet" in ak.show_config()
    plant(Planted(spoil("backward", 0)))
    testing.evaluate(ak.autofocus_conv, PLAIN, testing.make_tensors(PLAIN))
    lines = ak.show_config().splitlines()
    assert lines[-2] == "self-check cpu on cpu: 1 right, 1 wrong, 0 not checked"
    assert "backward (input, weight, attention)" in lines[-1] and "input is off by" in lines[-1]


def test_backends_that_ask_for_no_check_get_none(plant):
    planted = plant(Planted(spoil("forward", 0)))
    planted.checked = False
    call()
    assert planted.count("forward") == 1 and "nothing yet" in ak.show_config()
