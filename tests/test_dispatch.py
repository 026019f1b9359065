"""Which backend runs, who can force one, and what is said about the others."""

import inspect
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import autofocus_kernels as ak
from autofocus_kernels import dispatch, testing
from autofocus_kernels.backends.cuda import backend as cuda
from autofocus_kernels.backends.interface import Backend, CannotRun, Gradients, compute
from autofocus_kernels.call import Call, allows_tf32
from autofocus_kernels.geometry import resolve
from autofocus_kernels.testing import Case

CASE = Case("small", (5, 6), dilations=(1, 2))
ENVIRONMENT = "AUTOFOCUS_BACKEND"


def call(**options):
    return ak.autofocus_conv(**testing.make_tensors(CASE).arguments(), **CASE.options, **options)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    dispatch.log_refusal.cache_clear()


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends whose forward ran."""
    names = []
    for name in ("reference", "cpu"):
        backend = dispatch.backend_named(name)

        def forward(*arguments, name=name, kernel=backend.forward):
            names.append(name)
            kernel(*arguments)

        monkeypatch.setattr(backend, "forward", forward)
    return names


@pytest.fixture
def refuse(monkeypatch):
    def set_reason(name, reason):
        monkeypatch.setattr(dispatch.backend_named(name), "refusal", lambda call: reason)

    return set_reason


def test_what_a_kernel_did_to_the_gpu_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def no_memory(call):
        raise RuntimeError("out of memory: torch gives no 8 bytes of scratch memory")

    def find(device):
        raise RuntimeError("an illegal memory access was encountered")

    backend = SimpleNamespace(forward=no_memory)
    on_gpu = SimpleNamespace(input=SimpleNamespace(is_cuda=True, device="cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(torch.OutOfMemoryError, match="no 8 bytes"):
        compute(backend, "forward", on_gpu, ())
    monkeypatch.setattr(torch.cuda, "synchronize", find)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        compute(backend, "forward", on_gpu, ())


# ------------------------------------------------------------------ the choice


@pytest.mark.parametrize("name", dispatch.BACKENDS)
def test_every_backend_has_the_interface(name):
    if name == "triton":
        pytest.importorskip("triton")  # its functions are imported with it
    functions = {name: member for name, member in vars(Backend).items() if inspect.isfunction(member)}
    functions = {name: member for name, member in functions.items() if not name.startswith("_")}
    assert len(functions) == 8
    backend = dispatch.backend_named(name)
    for function, declared in functions.items():
        expected = list(inspect.signature(declared).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(backend, function)).parameters) == expected, function
    assert backend.checked == (name in ("triton", "cuda")) and backend.tiles_by_volume == (name == "triton")


def test_triton_has_no_function_that_no_backend_has():
    assert not hasattr(dispatch.backend_named("triton"), "sideways")


def test_cpu_tensors_run_on_the_cpu_backend_where_it_is_built(ran):
    call()
    built = dispatch.backend_named("cpu").unavailable() is None
    assert ran == (["cpu"] if built else ["reference"])


def test_a_refusal_falls_back_to_the_reference(ran, refuse):
    refuse("cpu", "it is Sunday")
    call()
    assert ran == ["reference"]


def test_one_log_line_for_each_reason(refuse, caplog):
    refuse("cpu", "it is Sunday")
    with caplog.at_level(logging.DEBUG, logger="autofocus_kernels"):
        call()
        call()
        refuse("cpu", "it is Monday")
        call()
    assert [record.getMessage() for record in caplog.records] == [
        "backend 'cpu' is not used: it is Sunday",
        "backend 'cpu' is not used: it is Monday",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_backend_that_takes_the_call_is_not_worth_a_line(backend, caplog):
    with caplog.at_level(logging.DEBUG, logger="autofocus_kernels"):
        call(backend=backend)
    assert not caplog.records


# ------------------------------------------------------------------ a backend that finds out only while it runs


@pytest.fixture
def tried(monkeypatch):
    """In place of the cpu backend one that takes every call and then cannot run it; the functions called."""
    names = []

    def cannot(function):
        def run(*_):
            names.append(function)
            raise CannotRun(f"no tile of {function} fits")

        return run

    functions = {name: cannot(name) for name in ("forward", "backward", "branch_statistics", "branch_combine")}
    backend, named = SimpleNamespace(refusal=lambda call: None, checked=False, **functions), dispatch.backend_named
    monkeypatch.setattr(dispatch, "backend_named", lambda name: backend if name == "cpu" else named(name))
    return names


def test_the_next_backend_takes_what_turns_out_to_be_beyond_one(tried, caplog):
    tensors = testing.make_tensors(CASE)
    with caplog.at_level(logging.DEBUG, logger="autofocus_kernels"):
        for _ in range(2):
            testing.judge(testing.evaluate(ak.autofocus_conv, CASE, tensors), CASE, tensors)
    assert tried == ["forward", "backward"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"backend 'cpu' is not used: no tile of {function} fits" for function in ("forward", "backward")
    ]


def test_the_next_backend_takes_the_steps_of_branch_norm_too(tried):
    layer = ak.AutofocusConv2d(3, 4, dilations=(1, 2), branch_norm=True)
    layer(torch.randn(2, 3, 6, 5))
    assert tried == ["branch_statistics", "branch_combine"]


def test_what_turns_out_to_be_beyond_a_forced_backend_is_an_error(tried):
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run this call: no tile of forward fits"):
        call(backend="cpu")


# ------------------------------------------------------------------ forcing one


def test_argument_forces(ran, backend):
    call(backend=backend)
    assert ran == [backend]


def test_environment_forces(ran, backend, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, backend)
    call()
    assert ran == [backend]


@pytest.mark.parametrize("name", [" cpu", "CPU", "Cpu\n"])
def test_environment_is_read_without_case_and_blanks(ran, name, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, name)
    call()
    assert ran == ["cpu"]


def test_argument_wins_over_the_environment(ran, backend, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "cuda")
    call(backend=backend)
    assert ran == [backend]


@pytest.mark.parametrize("empty", ["", " "])
def test_empty_environment_forces_nothing(ran, empty, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, empty)
    call()
    assert len(ran) == 1


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_forced_backend_that_refuses_is_an_error_with_the_reason(by, refuse, monkeypatch):
    refuse("cpu", "it is Sunday")
    if by == "environment":
        monkeypatch.setenv(ENVIRONMENT, "cpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run this call: it is Sunday"):
        call(backend="cpu" if by == "argument" else None)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_gpu_backends_refuse_cpu_tensors(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run this call: "):
        call(backend=name)


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT} must be .*got 'fast'"):
        call()
    assert f"{ENVIRONMENT} fast: every call fails, it must be one of reference, " in ak.show_config()


def test_a_forced_backend_runs_the_backward_too(backend, monkeypatch):
    forced, names = dispatch.backend_named(backend), []

    def backward(*arguments, kernel=forced.backward):
        names.append(backend)
        kernel(*arguments)

    monkeypatch.setattr(forced, "backward", backward)
    arguments = testing.make_tensors(CASE, requires_grad=True).arguments()
    ak.autofocus_conv(**arguments, **CASE.options, backend=backend).sum().backward()
    assert names == [backend]


# ------------------------------------------------------------------ which goes first on a GPU


HALF, FLOAT = torch.bfloat16, torch.float32
TENSOR = object()
# Function -> what it is called with besides the call (backends/interface.py), every gradient wanted, and its passes.
GPU_CALLS = {
    "forward": ((TENSOR,), ["forward"]),
    "backward": ((TENSOR, Gradients(TENSOR, TENSOR, TENSOR, TENSOR)), ["grad_input", "grad_attention", "grad_weight"]),
    "branch_statistics": ((TENSOR, None, None), ["forward"]),
    "branch_norm_backward": ((TENSOR,) * 8, ["grad_input", "grad_weight"]),
    "branch_combine": ((TENSOR,) * 4, []),
    "branch_reduce": ((TENSOR,) * 8, []),
}


class Gpu:
    """A GPU that is not there: backends that note who was asked to run what, and what the fast tier has."""

    def __init__(self, monkeypatch):
        self.ran, self.asked = [], []
        self.slow = set()  # passes that the fast tier leaves to the simple one
        self.reasons = {}  # backend -> why it refuses
        self.capability = (9, 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        monkeypatch.setattr(dispatch, "backend_named", self.backend)
        monkeypatch.setattr(dispatch, "_preferred", {})
        monkeypatch.setattr(cuda, "refusal", lambda call: self.reasons.get("cuda"))
        monkeypatch.setattr(cuda, "fast_refusal", self.fast_refusal)
        monkeypatch.setattr(cuda, "checked", False)
        for function in GPU_CALLS:
            monkeypatch.setattr(cuda, function, lambda *_: self.ran.append("cuda"))

    def backend(self, name):
        if name == "cuda":
            return cuda
        functions = dict.fromkeys(GPU_CALLS, lambda *_: self.ran.append(name))
        return SimpleNamespace(refusal=lambda call: self.reasons.get(name), checked=False, **functions)

    def fast_refusal(self, name, call):
        self.asked.append(name)
        return "not this one" if name in self.slow else None

    def run(self, function="forward", dtype=HALF, size=(5, 6), arguments=None, forced=None, batch=1):
        """Who ran it."""
        fake = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(batch, 3, *size))
        weight = SimpleNamespace(device=fake.device, dtype=dtype, shape=(4, 3, 3, 3))
        geometry = resolve(size, (3, 3), (1, 2))
        self.ran.clear()
        dispatch.run(
            function,
            Call(fake, weight, fake, None, None, None, geometry, forced),
            *(GPU_CALLS[function][0] if arguments is None else arguments),
        )
        return self.ran[0]


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("function", GPU_CALLS)
def test_cuda_goes_first_on_hopper_where_its_fast_tier_has_every_pass(gpu, function, dtype):
    passes = GPU_CALLS[function][1]
    assert gpu.run(function, dtype) == ("cuda" if passes else "triton")
    assert gpu.asked == passes


@pytest.mark.parametrize("function, slow", [(f, name) for f, (_, passes) in GPU_CALLS.items() for name in passes])
def test_triton_goes_first_where_one_pass_is_not_in_the_fast_tier(gpu, function, slow):
    gpu.slow = {slow}
    assert gpu.run(function) == "triton"


@pytest.mark.parametrize(
    "slow, gradients",
    [("grad_input", ["input"]), ("grad_attention", ["attention"]), ("grad_weight", ["weight", "branch_scale"])],
)
def test_only_the_gradients_that_are_wanted_count(gpu, slow, gradients):
    gpu.slow = {slow}
    others = Gradients(TENSOR, TENSOR, TENSOR, TENSOR)._replace(**dict.fromkeys(gradients))
    assert gpu.run("backward", arguments=(TENSOR, others)) == "cuda"
    for name in gradients:
        assert gpu.run("backward", arguments=(TENSOR, others._replace(**{name: TENSOR}))) == "triton"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)])
def test_triton_goes_first_on_other_gpus(gpu, capability):
    gpu.capability = capability
    assert gpu.run() == "triton" and not gpu.asked


def test_triton_goes_first_in_other_dtypes(gpu):
    assert gpu.run(dtype=torch.float64) == "triton" and not gpu.asked


def test_float32_is_asked_anew_where_tf32_is_allowed(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "allows_tf32", lambda dtype: bool(gpu.slow))
    assert gpu.run(dtype=FLOAT) == "cuda"
    gpu.slow = {"forward"}
    assert gpu.run(dtype=FLOAT) == "triton" and gpu.asked == ["forward", "forward"]


def test_a_cuda_library_that_is_not_there_is_not_asked_and_not_worth_a_line(gpu, caplog):
    gpu.reasons["cuda"] = "not built"
    assert gpu.run() == "triton" and not gpu.asked and not caplog.records


def test_triton_takes_what_cuda_finds_it_cannot_run_or_is_wrong_at(gpu, monkeypatch, caplog):
    monkeypatch.setattr(cuda, "checked", True)
    monkeypatch.setattr(dispatch.self_check, "refusal", lambda name, *_: f"{name} is wrong")
    assert gpu.run() == "triton"
    assert [record.getMessage() for record in caplog.records] == ["backend 'cuda' is not used: cuda is wrong"]


def test_a_forced_backend_wins_over_the_order_of_a_gpu(gpu, monkeypatch):
    assert gpu.run(forced="triton") == "triton"
    monkeypatch.setenv(ENVIRONMENT, "triton")
    assert gpu.run() == "triton"
    monkeypatch.setenv(ENVIRONMENT, "cuda")
    assert gpu.run(dtype=FLOAT) == "cuda" and not gpu.asked


def test_the_fast_tier_is_asked_once_for_calls_of_one_kind(gpu):
    for _ in range(3):
        assert gpu.run("backward") == "cuda"
    assert gpu.asked == GPU_CALLS["backward"][1]
    gpu.slow = {"grad_input"}
    assert gpu.run("backward", size=(7, 6)) == "triton"
    assert gpu.run("backward", batch=2) == "triton"
    assert gpu.run("backward") == "cuda"


def test_each_backend_is_tried_once(gpu, monkeypatch):
    tried = []

    def cannot(*_):
        tried.append("cuda")
        raise CannotRun("no tile fits")

    monkeypatch.setattr(cuda, "forward", cannot)
    gpu.reasons["triton"] = "not installed"
    assert gpu.run() == "reference" and tried == ["cuda"]


@pytest.mark.parametrize(
    "dtype, precision, hip, allowed",
    [
        (torch.float32, "tf32", None, True),
        (torch.float32, "ieee", None, False),
        (torch.bfloat16, "tf32", None, False),
        (torch.float64, "tf32", None, False),
        (torch.float32, "tf32", "6.4", False),
    ],
)
def test_tf32_is_allowed_where_torchs_own_convolutions_use_it(monkeypatch, dtype, precision, hip, allowed):
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=precision))
    monkeypatch.setattr(torch.version, "hip", hip)
    assert allows_tf32(dtype) is allowed


# ------------------------------------------------------------------ what a call is refused for


def reason(name, case, dtype=torch.float32, device="cpu"):
    return dispatch.backend_named(name).refusal(testing.call_of(case, testing.make_tensors(case, dtype, device)))


def test_reasons_of_the_cpu_backend():
    if dispatch.backend_named("cpu").unavailable() is not None:
        assert reason("cpu", CASE) == dispatch.backend_named("cpu").unavailable()
        return
    assert reason("cpu", CASE) is None
    assert "meta" in reason("cpu", CASE, device="meta")
    assert "float8" in reason("cpu", CASE, torch.float8_e5m2)
    assert "33 branches" in reason("cpu", Case("many", (5,), dilations=tuple(range(1, 34))))


def test_the_reference_refuses_nothing():
    assert reason("reference", CASE, torch.float64, "meta") is None


# ------------------------------------------------------------------ telling the user


def test_available_backends():
    backends = ak.available_backends()
    assert list(backends) == ["reference", "cpu", "triton", "cuda"]
    assert backends["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in backends.values())


def test_show_config_names_versions_and_every_backend(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "reference")
    text = ak.show_config()
    assert ak.__version__ in text and torch.__version__ in text
    assert f"{ENVIRONMENT} reference" in text
    for name, reason in ak.available_backends().items():
        line = next(line for line in text.splitlines() if line.startswith(f"backend {name}"))
        assert line.endswith("available") if reason is None else reason in text
    kernels = re.findall(
        r"^cpu kernels +(?:avx512|avx2|generic), bfloat16 multiplied by (?:AMX|AVX512_BF16|float32)$", text, re.M
    )
    assert len(kernels) == (ak.available_backends()["cpu"] is None)


@pytest.mark.parametrize(
    "capability, missing, expected",
    [
        (
            (9, 0),
            (),
            "cuda, triton, reference for float16, bfloat16, float32 where the fast tier has every pass; "
            "else triton, cuda, reference",
        ),
        ((9, 0), ("cuda",), "triton, reference"),
        ((9, 0), ("triton",), "cuda, reference"),
        ((8, 0), (), "triton, cuda, reference"),
        ((7, 5), (), "reference: compute capability (7, 5) is below (8, 0)"),
    ],
)
def test_show_config_says_which_kernels_a_gpu_gets(monkeypatch, capability, missing, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU of the test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reasons = {name: "not here" if name in missing else None for name in dispatch.BACKENDS}
    monkeypatch.setattr("autofocus_kernels.config.available_backends", lambda: reasons)
    lines = ak.show_config().splitlines()
    at = lines.index("cuda device 0     GPU of the test")
    assert lines[at + 1] == f"  kernels         {expected}"


def test_command_line_prints_the_config():
    printed = subprocess.run(
        [sys.executable, "-m", "autofocus_kernels"], capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith(f"autofocus_kernels {ak.__version__}\n") and "backend cuda" in printed
