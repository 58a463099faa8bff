"""Triton as it is installed: its version, its launcher, and our kernels beside it.

Each is found out once, so that a call costs no search. Importing this module does not import
Triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import subprocess

LEAST_VERSION = (3, 6)  # the oldest that the kernels have been compiled and interpreted with


@functools.cache
def missing_reason() -> str | None:
    """Return why the kernels cannot be imported here, None where they can."""
    try:
        installed = version()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and (int(numbers[1]), int(numbers[2])) < LEAST_VERSION:
        return "Triton {} is installed, needs {}.{} or newer".format(installed, *LEAST_VERSION)
    # They lie beside the package in a source tree, and within it only where it is installed.
    if importlib.util.find_spec("attn_kd.kernels") is None:
        return (
            "attn_kd.kernels is not there (this source tree is not installed: run "
            "`pip install --no-build-isolation -e .`)"
        )
    return None


@functools.cache
def driver_missing_reason() -> str | None:
    """Return why Triton cannot launch kernels on this machine's GPU, None where it can.

    Triton compiles its access to the driver, which is written in C, when that is first used, and
    keeps it in its cache. Here this is done at once: where a C compiler, Python's header files or
    libcuda.so are missing, the first call would fail deep inside of Triton.
    """
    try:
        importlib.import_module("triton").runtime.driver.active.get_current_target()
    except subprocess.CalledProcessError as error:
        why = f"{error.cmd[0]} fails; it takes a C compiler and Python's header files"
    except Exception as error:  # a RuntimeError, an AssertionError, an OSError: as it comes
        why = " ".join(str(error).split())
    else:
        return None
    return f"Triton cannot launch kernels ({why})"


def version() -> str:
    """Return the version that is installed; an ImportError where there is none."""
    return importlib.import_module("triton").__version__
