"""A pytest plugin, for gpu_check.py: shows why a test failed as soon as it has, beside its name.

pytest itself shows it when all tests are done, which a run that is killed never gets to.
"""

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_report_teststatus(report):
    category, letter, word = yield
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = " ".join(str(report.longrepr if crash is None else crash.message).split())
        word = f"{word} ({reason})"
    return category, letter, word
