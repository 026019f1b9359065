"""A plugin of pytest: why a test failed stands beside its name in the moment it does, as gpu_check.py asks for by -p.

By itself pytest says so when all tests are done, which a run that is killed never comes to.
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
