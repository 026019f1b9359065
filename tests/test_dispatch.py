"""Which backend runs, who can force one, and what is said about the others."""

import inspect
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import autofocus_kernels as ak
from autofocus_kernels import dispatch, testing
from autofocus_kernels.backends.interface import Backend, CannotRun
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


def test_a_forced_backend_runs_the_backward_too(backend, monkeypatch):
    forced, names = dispatch.backend_named(backend), []

    def backward(*arguments, kernel=forced.backward):
        names.append(backend)
        kernel(*arguments)

    monkeypatch.setattr(forced, "backward", backward)
    arguments = testing.make_tensors(CASE, requires_grad=True).arguments()
    ak.autofocus_conv(**arguments, **CASE.options, backend=backend).sum().backward()
    assert names == [backend]


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


def test_command_line_prints_the_config():
    printed = subprocess.run(
        [sys.executable, "-m", "autofocus_kernels"], capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith(f"autofocus_kernels {ak.__version__}\n") and "backend cuda" in printed
