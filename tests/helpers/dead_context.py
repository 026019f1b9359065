"""What a wrong kernel may leave behind: a context in which every call of CUDA fails, as long as the process lives."""

import os
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def a_dead_context_ends_the_process(request):
    """Or all tests that follow would fail. xdist goes on in a new process, and this test alone is one that crashed."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = f"{request.node.nodeid} leaves a GPU that cannot be used: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(reason, returncode=1)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{reason}", file=sys.stderr, flush=True)
        os._exit(1)
