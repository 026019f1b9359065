"""What test files share: the backends that can run here, deterministic examples, tiny phantoms."""

import gc
import os

# For what the tests start: several processes share the cores. Before torch is imported, which reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from autofocus_kernels.dispatch import backend_named

pytest.register_assert_rewrite("helpers")

from helpers.cuda_emulation import device, exact_float32, library, simple_tier, tf32, tier  # noqa: F401, fixtures

settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.load_profile("tests")


# The files that take longest, in minutes or many seconds: first, so that no worker is left with one at the end.
LONGEST = (
    "test_cuda_compile",
    "test_cuda_host",
    "test_cuda_ptx",
    "test_cuda_branch_norm",
    "test_triton_interpreter",
    "test_triton_norm",
    "test_packaging",
    "test_triton_aot",
    "test_triton_ptx",
    "test_cuda_parts",
    "test_gpu_check",
    "test_benchmarks",
    "test_cuda_emulation",
    "test_examples",
    "test_segmentation_train",
    "test_compile",
    "test_branch_norm",
    "test_backends",
    "test_onnx",
    "test_cross_build",
    "test_cuda_lattices",
)


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable: the others stay as they were


def pytest_collection_finish():
    """What is there by now stays: torch.compile and the benchmarks collect garbage again and again, a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny problems on several threads spend their time at barriers, minutes of it on a busy machine.

    Tests about threads set their own number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each backend that runs on CPU tensors. tests/test_environment.py sees to it that none is missing unnoticed."""
    reason = backend_named(request.param).unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(scope="session")
def phantom_2d(tmp_path_factory):
    """Six cases for training and two for tests, of 36 x 32 pixels and two modalities."""
    make_phantom = pytest.importorskip("autofocus_kernels.segmentation.phantom", exc_type=ImportError).make_phantom
    folder = tmp_path_factory.mktemp("phantom_2d")
    make_phantom(folder, cases=8, seed=0, size=(36, 32), dims=2)
    return folder


@pytest.fixture(scope="session")
def phantom_3d(tmp_path_factory):
    """Three cases for training and one for tests, anisotropic."""
    make_phantom = pytest.importorskip("autofocus_kernels.segmentation.phantom", exc_type=ImportError).make_phantom
    folder = tmp_path_factory.mktemp("phantom_3d")
    make_phantom(folder, cases=4, seed=0, size=(24, 26, 10), dims=3, anisotropic=True)
    return folder
