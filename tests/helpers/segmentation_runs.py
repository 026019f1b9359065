"""What the tests of segmentation share: a training of seconds, and processes that are killed."""

import dataclasses
import gzip
import multiprocessing
import os
import signal
import warnings

import pytest

pytest.importorskip("autofocus_kernels.segmentation.extra", exc_type=ImportError)
import nibabel

from autofocus_kernels.segmentation.recipe import PUBLISHED

# Of six cases for training five are trained on: two epochs are six iterations, with a validation after three each.
SMALL = {
    "arch": "AFN-1",
    "recipe": dataclasses.replace(PUBLISHED, batch_size=2, epochs=2),
    "widths": (3, 3, 3, 4),
    "dilations": (1, 2, 3, 4),
    "window": (24,),
    "device": "cpu",
    "progress": False,
}


def rewrite_header(path, field, index, value):
    """One number of a NIfTI-1 header, in the file: nibabel would write it only as it should be."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read()
    header = nibabel.Nifti1Header(content[:348], check=False)
    header[field][index] = value
    with opener(path, "wb") as file:
        file.write(header.binaryblock + content[348:])


def in_process(function, *arguments):
    """Runs in a process of its own, forked since to import MONAI takes seconds; returns its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks of processes with threads, here idle ones
        process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
        process.start()
    process.join(60)
    code = process.exitcode
    process.kill()  # one that hangs would keep the tests from ending
    return code


def kill_before_file(number):
    """From here on the operating system ends this process right before that file, written in full, gets its name."""
    replace, count = os.replace, [0]

    def counted(source, target):
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = counted
