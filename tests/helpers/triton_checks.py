"""What the Triton launcher decides, checked in the interpreter's process: triton_worker.py runs each function here."""

import contextlib
import dataclasses
import itertools
import logging
import math
from types import SimpleNamespace

import torch
import triton.language as tl
from triton.runtime.errors import OutOfResources

from autofocus_kernels import autofocus_conv, dispatch, self_check, testing
from autofocus_kernels.backends import triton as triton_backend
from autofocus_kernels.backends.interface import Gradients
from autofocus_kernels.backends.triton import addressing, backend, launch
from autofocus_kernels.backends.triton.configs import Config, choose_tiling, configurations
from autofocus_kernels.testing import Case, call_of

CASE = Case("small", (3, 5), dilations=(1, 2), kernel_size=(1, 3))
SMALL, BIG = (Config(rows, 16, 16, 4, 255) for rows in (16, 64))


@contextlib.contextmanager
def replaced(owner, **values):
    """``owner``'s attributes are ``values`` inside."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def logged():
    """The messages of the package's logger, from INFO on."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
    logger = logging.getLogger("autofocus_kernels")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def candidates(*configs, refused=(), error=None):
    """The launcher has these configurations, and the device refuses some; yields the rows of those launched."""
    launch.forget()
    dispatch.log_refusal.cache_clear()
    launched, submit = [], launch.submit

    def submit_or_refuse(work):
        if "TILING" not in work.plan.constants:  # it packs or adds up
            return submit(work)
        launched.append(work.plan.constants["TILING"].rows)
        if launched[-1] in [config.rows for config in refused]:
            raise error or OutOfResources(300000, 232448, "shared memory")
        submit(work)

    with replaced(launch, configurations=lambda *key: configs, submit=submit_or_refuse):
        yield launched


def forward(case=CASE):
    tensors = testing.make_tensors(case)
    output = torch.full_like(tensors.grad_output, math.nan)
    backend.forward(call_of(case, tensors), output)
    expected = testing.truth(case, tensors)["output"]
    assert testing.relative_error(output, expected) < 1e-6


def message_of(error, call):
    """The message of the error that ``call`` must raise."""
    try:
        call()
    except error as raised:
        return str(raised)
    raise AssertionError(f"no {error.__name__}")


# ------------------------------------------------------------------ configurations


def a_configuration_that_does_not_fit_gives_way():
    with candidates(BIG, SMALL, refused=[BIG]) as launched, logged() as messages:
        forward()
        forward()
    assert launched == [64, 16, 16], launched  # refused, next; then the one that fitted
    ((level, message),) = messages
    assert level == "INFO" and "rows=64" in message and "does not fit" in message


def configurations_suit_channels_and_chip():
    """Whole products, no wider than the channels; registers that an SM has; the least demanding last."""
    kernels = ["forward", "forward_scaled", "grad_attention", "grad_scaled"]
    kernels += [f"grad_input_weight{of}" for of in ("", "_scaled", "_branches")]
    arithmetics = ((2, "ieee"), (4, "tf32"), (4, "ieee"))
    widths = (1, 16, 17, 32, 33, 64, 65, 128, 129)
    for key in itertools.product(kernels, arithmetics, (8, 9, 10), widths, widths):
        kernel, arithmetic, capability, C, O = key
        found = configurations(kernel, *arithmetic, capability, C, O)
        for config in found:
            for block, channels in ((config.block_c, C), (config.block_o, O)):
                assert block >= 16 and block.bit_count() == 1 and block < max(17, 2 * channels), (key, config)
            assert config.rows >= 32 and config.rows.bit_count() == 1, (key, config)
            assert config.num_warps.bit_count() == 1 and config.registers <= 255, (key, config)
            assert 32 * config.num_warps * config.registers <= 2**16, (key, config)
            assert all(most >= least for most, least in zip(config[:4], found[-1])), (key, config)
    for capability, rows in ((8, 128), (9, 256), (10, 128)):
        first, second, _ = configurations("forward", 2, "ieee", capability, 64, 64)
        assert (first.rows, second.rows) == (rows, 384 - rows) and first.registers == second.registers == 128
    for C, O, registers in ((32, 32, 128), (33, 32, 255), (32, 33, 255)):
        assert configurations("grad_input_weight", 2, "ieee", 9, C, O)[0].registers == registers, (C, O)


def a_compiler_that_fails_counts_as_a_misfit_and_no_other_error_does():
    with candidates(BIG, SMALL, refused=[BIG], error=RuntimeError("PassManager::run failed")) as launched:
        forward()
    assert launched == [64, 16], launched
    for error in (RuntimeError("Triton Error [CUDA]: an illegal memory access"), torch.OutOfMemoryError("no room")):
        with candidates(BIG, SMALL, refused=[BIG], error=error) as launched:
            assert message_of(type(error), forward) == str(error)
        assert launched == [64], launched


def one_that_fitted_may_stop_fitting():
    """A class of problems holds layouts and 64-bit offsets that need more registers."""
    refused, larger = [], dataclasses.replace(CASE, name="larger", size=(4, 5))
    with candidates(BIG, SMALL, refused=refused) as launched:
        forward()
        refused.append(BIG)
        forward(larger)
        forward(larger)
    assert launched == [64, 64, 64, 16, 16], launched  # chosen; refused, and tried once more, then the next


def nothing_fits_and_another_backend_takes_the_call():
    """Forward and backward, one log line each; the next calls try nothing; a forced backend is an error."""
    names = ("triton", "reference")
    with candidates(BIG, SMALL, refused=[BIG, SMALL]) as launched, logged() as messages:
        with replaced(dispatch, PREFERENCE={"cpu": names}):
            for _ in range(2):
                testing.check(None, CASE)
        # The forward, then the first kernel of the backward.
        assert launched == [64, 16, 64, 16], launched
        warnings = [message for level, message in messages if level == "WARNING"]
        assert len(warnings) == 2, warnings
        for kernel, warning in zip(("'forward'", "'grad_input_weight'"), warnings):
            assert warning.startswith("backend 'triton' is not used: no configuration fits"), warning
            assert kernel in warning, warning
        tensors = testing.make_tensors(CASE)
        arguments = tensors.arguments()
        with replaced(launch, gather_source=None):  # not even a copy is made
            message = message_of(RuntimeError, lambda: autofocus_conv(**arguments, **CASE.options, backend="triton"))
        assert message.startswith("backend 'triton' cannot run this call: no configuration fits"), message
        assert "out of resource: shared memory, Required: 300000" in message, message
        assert len(launched) == 4, launched


def what_fits_runs_though_another_pass_does_not_fit():
    grad_kernels = [launch.kernels.grad_attention_kernel]
    with candidates(SMALL) as launched:
        submit = launch.submit

        def refuse_one(work):
            if work.plan.kernel in grad_kernels:
                raise OutOfResources(300000, 232448, "shared memory")
            submit(work)

        with replaced(launch, submit=refuse_one), replaced(dispatch, PREFERENCE={"cpu": ("triton", "reference")}):
            for _ in range(2):
                testing.check(None, CASE)
    # Two forwards, and the gather of the first backward; the second knows beforehand that it ends in a refusal.
    assert len(launched) == 3, launched


# ------------------------------------------------------------------ the weight


def the_weight_is_repacked_once_for_all_kernels_that_read_it_alike():
    launched = []
    with candidates(SMALL), replaced(launch, submit=lambda work: launched.append(work.plan.kernel)):
        for mode, function, repacked in (
            ("plain", "forward", 1),
            ("plain", "backward", 1),
            ("branch", "backward", 2),  # by output and by input channels
            ("plain", "branch_statistics", 1),  # a kernel for each branch
        ):
            case = dataclasses.replace(CASE, mode=mode)
            tensors = testing.make_tensors(case)
            call = call_of(case, tensors)
            if function == "forward":
                backend.forward(call, tensors.grad_output)
            elif function == "backward":
                like = (tensors.input, tensors.weight, tensors.attention, tensors.branch_scale)
                backend.backward(call, tensors.grad_output, Gradients(*like))
            else:
                backend.branch_statistics(call, torch.stack(2 * [tensors.grad_output]), None, None)
            assert launched.count(launch.packing.repack_kernel) == repacked, (mode, function, launched)
            launched.clear()


# ------------------------------------------------------------------ the self-check


def a_right_kernel_passes_its_self_check_and_a_wrong_one_is_refused():
    with candidates(SMALL) as launched, logged() as messages, replaced(backend, checked=True):
        with replaced(dispatch, PREFERENCE={"cpu": ("triton", "reference")}):
            self_check.forget()
            testing.check(None, CASE)
            assert len(launched) == 6 and not messages, (launched, messages)  # three kernels, checked and run
            self_check.forget()
            with replaced(launch, _shift=lambda call: None):  # the bias is forgotten
                testing.check(None, CASE)
    assert len(launched) == 6 + 3, launched  # of the wrong ones only the checks
    functions = ("forward (output)", "backward (input, weight, attention)")
    for (_, message), function, wrong in zip(messages, functions, ("output", "attention")):
        assert message.startswith(f"backend 'triton' is not used: its self-check fails, {function} for"), message
        assert f": {wrong} is off by" in message and message.count("is off by") == 1, message
    assert len(messages) == 2, messages


def a_small_problem_has_the_tiles_of_the_one_it_stands_for():
    call = call_of(Case("large", (170, 60), dilations=(2, 6, 10)), testing.make_tensors(Case("any", (5, 6))))
    small = self_check._small(call.geometry, 4, 5, backend.tiles_by_volume)
    assert small.input_size < call.geometry.input_size
    for transposed in (False, True):
        walks = [launch.Walk(problem.as_3d, SMALL, 1, transposed) for problem in (call.geometry, small)]
        assert walks[0].tiling == walks[1].tiling and walks[0].num_tiles > walks[1].num_tiles > 1


def tiles_lie_on_lattices_where_their_reads_meet():
    """Results are right on any lattice and in any box; this is about what they read."""
    cube, even = (64, 64, 64), (2, 6, 10, 14)
    for size, dilations, options, transposed, expected in (
        (cube, even, {}, False, ((1, 2, 2), (1, 2, 2), (1, 8, 16))),
        (cube, even, {}, True, ((1, 2, 2), (1, 2, 2), (1, 8, 16))),
        (cube, (1, 3, 5, 7), {}, False, ((1, 1, 1), (1, 1, 1), (1, 8, 16))),
        (cube, (1, 2), {"kernel_size": 5}, False, ((1, 1, 1), (1, 1, 1), (1, 8, 16))),
        (cube, (3, 6, 9), {}, False, ((3, 3, 3), (3, 3, 3), (2, 8, 8))),
        # Every other voxel is on one lattice as it is.
        (cube, even, {"stride": 2}, False, ((1, 1, 1), (2, 2, 2), (1, 8, 16))),
        (cube, even, {"stride": 2}, True, ((2, 2, 2), (1, 1, 1), (1, 4, 32))),
        (cube, even, {"stride": 3}, True, ((3, 3, 3), (1, 1, 1), (2, 8, 8))),
        (cube, (4, 8), {"stride": 2}, False, ((1, 2, 2), (2, 4, 4), (1, 8, 16))),
        (cube, (2, 4), {"stride": (1, 2, 4)}, False, ((2, 1, 1), (2, 2, 4), (2, 16, 4))),
        (cube, (2, 4), {"stride": (1, 2, 4)}, True, ((1, 2, 4), (1, 1, 1), (1, 8, 16))),
        ((64, 64, 4), (2, 6), {}, False, ((1, 2, 1), (1, 2, 1), (1, 32, 4))),
        ((4096,), (4, 8), {}, False, ((1, 1, 4), (1, 1, 4), (1, 1, 128))),
        ((5, 7, 3), (1, 2), {}, False, ((1, 1, 1), (1, 1, 1), (4, 8, 4))),
    ):
        case = Case("any", size, dilations=dilations, padding=2 if "stride" in options else "same", **options)
        tiling = choose_tiling(case.geometry.as_3d, 128, transposed)
        found = tiling.step, tiling.move, tiling.tile
        assert found == expected, (size, dilations, options, transposed, found)


def programs_of_the_self_check_go_from_tile_to_tile():
    """As those of a large problem, in the sum of grad_weight."""
    case = dataclasses.replace(CASE, size=(9, 40))
    tensors = testing.make_tensors(case)
    call, grids = call_of(case, tensors), {}
    with candidates(SMALL), replaced(launch, _resident_programs=lambda device, config: 10**6):
        submit = launch.submit

        def recorded(work):
            grids.setdefault(work.plan.kernel, []).append(work.plan.grid[0])
            submit(work)

        results = []
        with replaced(launch, submit=recorded):
            for few_blocks in (False, True):
                geometry = dataclasses.replace(call.geometry, few_blocks=few_blocks)
                results.append(torch.full_like(call.weight, math.nan))
                gradients = Gradients(None, results[-1], None, None)
                backend.backward(call._replace(geometry=geometry), tensors.grad_output, gradients)
    many, few = grids[launch.kernels.grad_input_weight_kernel]
    assert many > 16 and few == launch.ceil_div(many, 3), (many, few)
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------ 64-bit offsets

# Planes this many elements apart: the third begins past 2^31. Only pages that are touched take memory.
FAR = 2**30 + 64


def far_apart(tensor):
    """A copy of ``tensor`` [N, C, D, H, W] with adjacent channels and planes FAR apart."""
    N, C, D, H, W = tensor.shape
    strides = (H * W * C, 1, FAR, W * C, C)
    memory = torch.empty((D - 1) * FAR + N * H * W * C, dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


def offsets_beyond_32_bits():
    """Each volume in turn so far apart that its offsets need 64 bits: the same bits as packed (or the process dies)."""
    for mode in ("plain", "branch"):
        case = Case("far", (3, 2, 1), 8, 8, dilations=(1, 2), kernel_size=(3, 1, 1), mode=mode, layout="channels_last")
        same_bits_far_apart(case, ("input", "attention", "grad_output", "output", "grad_input", "grad_attention"))


def offsets_beyond_32_bits_from_outside_the_volume():
    """Two planes need 32 bits, unless offsets count from a position that reads, or is read, far outside of them."""
    for padding, names in ((4, ("input",)), (-3, ("attention", "grad_output"))):
        case = Case(
            "padded",
            (2 if padding > 0 else 10, 2, 1),
            8,
            8,
            dilations=(1, 2),
            kernel_size=(3, 1, 1),
            padding=(padding, 0, 0),
            layout="channels_last",
        )
        same_bits_far_apart(case, names)


def same_bits_far_apart(case, names):
    tensors = testing.make_tensors(case, torch.float16)

    def run(far=None):
        def placed(name, tensor):
            return far_apart(tensor) if name == far else tensor

        given = tensors._replace(
            **{name: placed(name, getattr(tensors, name)) for name in ("input", "attention", "grad_output")}
        )
        filled = {"output": tensors.grad_output, "grad_input": tensors.input, "grad_attention": tensors.attention}
        nan = {name: placed(name, torch.full_like(like, math.nan)) for name, like in filled.items()}
        scale = None if given.branch_scale is None else torch.full_like(given.branch_scale, math.nan)
        grad_weight = torch.full_like(given.weight, math.nan)
        call = call_of(case, given)
        backend.forward(call, nan["output"])
        gradients = Gradients(nan["grad_input"], grad_weight, nan["grad_attention"], scale)
        backend.backward(call, given.grad_output, gradients)
        return [*nan.values(), grad_weight, *([] if scale is None else [scale])]

    with candidates(SMALL):
        expected = run()
        assert not any(result.isnan().any() for result in expected)
        for name in names:
            for result, right in zip(run(name), expected):
                assert torch.equal(result, right), f"{case.mode}, {name} far apart"


# ------------------------------------------------------------------ what kernels are told of tensors and numbers


def offsets_have_64_bits_from_a_span_of_two_to_the_31():
    """Of batch entries they always have. No memory: of tensors on the meta device."""

    def dtype(axis, size, stride, beyond=()):
        shape, strides = ([other if i == axis else 1 for i in range(5)] for other in (size, stride))
        return launch.row_dtype(torch.empty_strided(shape, strides, device="meta"), beyond=beyond)

    for axis in range(1, 5):
        assert dtype(axis, 2, 2**31 - 1) == tl.int32, axis
        assert dtype(axis, 2, 2**31) == dtype(axis, 5, 2**29) == tl.int64, axis
    assert dtype(0, 3, 2**31) == tl.int32
    for axis in range(2, 5):
        for beyond, expected in ((2, tl.int32), (3, tl.int64)):
            assert dtype(axis, 2, 2**29, [beyond * (i == axis - 2) for i in range(3)]) == expected, (axis, beyond)
        assert dtype(axis, 2, 2**29, [9 * (i != axis - 2) for i in range(3)]) == tl.int32, axis
    assert dtype(1, 2, 2**29, (9, 9, 9)) == dtype(4, 1, 2**31, (9, 9, 9)) == tl.int32
    near, far = (torch.empty_strided((1, 2, 1, 1, 1), (0, stride, 1, 1, 1), device="meta") for stride in (1, 2**31))
    assert launch.row_dtype(near, None, far, near) == tl.int64


def a_number_stands_for_those_that_triton_compiles_alike():
    numbers = (-(2**31) - 1, -(2**31), -16, -1, 0, 1, 2, 16, 2**31 - 1, 2**31, 2**40)
    for number, representative in zip(numbers, launch._representative(numbers), strict=True):
        for alike in (lambda n: n == 1, lambda n: -(2**31) <= n < 2**31):
            assert alike(number) == alike(representative), (number, representative)
        assert representative % 16 != 0, representative


def rows_are_loaded_as_widely_as_all_are_aligned():
    """The interpreter loads anything; a GPU ends the process at a load that is wider than its address allows."""
    last = torch.empty_strided((2, 8, 3, 2, 2), (96, 1, 32, 16, 8))
    assert launch.alignment(last) == 4 and launch.alignment(last.half()) == 8
    assert launch.alignment(last.flatten()[4:].view(1, 188, 1, 1, 1)) == 4
    for offset in (1, 2, 3):  # in elements; less than 16 bytes say nothing of the rows
        assert launch.alignment(last.as_strided((1, 8, 2, 2, 2), last.stride(), offset)) == 1, offset
    for axis in (0, 2, 3, 4):
        for stride, expected in ((1, 1), (6, 2), (12, 4), (8, 4)):
            shape, strides = ([other if i == axis else one for i in range(5)] for other, one in ((2, 1), (stride, 7)))
            assert launch.alignment(torch.empty_strided(shape, strides)) == expected, (axis, stride)
    for channels, stride, expected in ((1, 3, 4), (2, 1, 4), (2, 4, 1), (3, 0, 1)):
        assert launch.alignment(torch.empty_strided((1, channels, 1, 1, 2), (1, stride, 1, 1, 4))) == expected, (
            channels,
            stride,
        )
    narrow = torch.empty_strided((2, 2, 1, 1, 1), (2, 1, 1, 1, 1))
    assert launch.alignment(last, None, narrow) == launch.alignment(narrow, last) == 2


def positions_are_one_axis_where_they_lie_evenly_apart():
    for size, stride, expected in (
        ((2, 3, 4), (12, 4, 1), 1),
        ((2, 3, 4), (24, 8, 2), 2),
        ((2, 3, 4), (0, 0, 0), 0),
        ((2, 1, 4), (4, 9, 1), 1),
        ((2, 3, 1), (21, 7, 9), 7),
        ((1, 1, 1), (5, 6, 7), 1),
        ((2, 3, 4), (12, 5, 1), None),
        ((2, 3, 4), (13, 4, 1), None),
        ((2, 3, 4), (12, 4, 2), None),
        ((2, 1, 4), (9, 4, 1), None),
        ((4, 3, 2), (1, 4, 12), None),
    ):
        for outer in ((2, 5), (1, 1)):
            assert launch._collapsed_stride((*outer, *size), (1000, 100, *stride)) == expected, (size, stride)


def gathered_tensors_have_whole_loads_of_channels():
    """And no more: of one channel, one."""
    for dtype, widths in ((torch.float32, (1, 2, 4, 4, 4, 4)), (torch.float16, (1, 2, 4, 4, 8, 8))):
        for channels, width in zip((1, 2, 3, 4, 5, 41), widths):
            # One that packing sees as one axis, in several blocks, and one that it does not.
            large = torch.randn(2, channels, 3, 7, 9).to(dtype)
            for tensor in (large, large[..., 1:6]):
                source = launch.gather_source(tensor)
                padded = source.tensor
                assert source.align == width and launch.alignment(padded) % width == 0, (dtype, channels)
                assert padded.shape[1] == launch.ceil_div(channels, width) * width, (dtype, channels)
                assert torch.equal(padded[:, :channels], tensor) and not padded[:, channels:].any(), (dtype, channels)
    packed = torch.randn(2, 3, 2, 5, 8).movedim(-1, 1)
    assert launch.gather_source(packed).tensor is packed


# ------------------------------------------------------------------ what is refused


def what_is_beyond_the_kernels_is_refused_and_what_is_not_is_right():
    """Coordinates, and bits for the taps: to the last that fits."""
    assert addressing.OUTSIDE.value == triton_backend.COORDINATE_LIMIT
    for size, dilation, kernel, reason in (
        (7, 2**30 - 8, 3, None),
        (7, 2**30 - 7, 3, "coordinates of 1073741824 and more are read"),
        (40, 1, 29, None),  # 31 bits, one word of 32
        (40, 1, 31, None),
        (40, 1, 61, None),
        (40, 1, 63, "the kernel's sizes add up to more than 63"),
    ):
        case = Case("limits", (size,), 2, 2, dilations=(1, dilation), kernel_size=kernel)
        assert backend.refusal(call_of(case, testing.make_tensors(case))) == reason, case
        if reason is None:
            with candidates(Config(64, 16, 16, 4, 255)):
                testing.check("triton", case)


def other_dtypes_and_devices_are_refused():
    call = call_of(CASE, testing.make_tensors(CASE))
    assert backend.refusal(call) is None
    assert backend.refusal(call._replace(input=call.input.double())).startswith("dtype torch.float64 is none of")
    on_meta = backend.refusal(call._replace(input=call.input.to("meta")))
    assert on_meta == "tensors are on meta, the kernels run on cpu", on_meta


def gpus_before_compute_capability_8_are_refused():
    device = torch.device("cuda", 0)
    geometry = SimpleNamespace(farthest=1, as_3d=CASE.geometry.as_3d)
    call = SimpleNamespace(input=SimpleNamespace(dtype=torch.float16, device=device), geometry=geometry)
    with replaced(triton_backend, interpreted=lambda: False):
        for capability, reason in (((7, 5), "compute capability (7, 5) is below (8, 0)"), ((8, 0), None)):
            with replaced(torch.cuda, get_device_capability=lambda device, of=capability: of):
                assert backend.refusal(call) == reason, capability
                with replaced(torch.version, hip="6.4"):
                    assert backend.refusal(call) is None, capability


CHECKS = (
    a_configuration_that_does_not_fit_gives_way,
    configurations_suit_channels_and_chip,
    a_compiler_that_fails_counts_as_a_misfit_and_no_other_error_does,
    one_that_fitted_may_stop_fitting,
    nothing_fits_and_another_backend_takes_the_call,
    what_fits_runs_though_another_pass_does_not_fit,
    the_weight_is_repacked_once_for_all_kernels_that_read_it_alike,
    a_right_kernel_passes_its_self_check_and_a_wrong_one_is_refused,
    a_small_problem_has_the_tiles_of_the_one_it_stands_for,
    tiles_lie_on_lattices_where_their_reads_meet,
    programs_of_the_self_check_go_from_tile_to_tile,
    offsets_beyond_32_bits,
    offsets_beyond_32_bits_from_outside_the_volume,
    offsets_have_64_bits_from_a_span_of_two_to_the_31,
    a_number_stands_for_those_that_triton_compiles_alike,
    rows_are_loaded_as_widely_as_all_are_aligned,
    positions_are_one_axis_where_they_lie_evenly_apart,
    gathered_tensors_have_whole_loads_of_channels,
    what_is_beyond_the_kernels_is_refused_and_what_is_not_is_right,
    other_dtypes_and_devices_are_refused,
    gpus_before_compute_capability_8_are_refused,
)
