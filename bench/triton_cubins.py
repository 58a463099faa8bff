"""Compiles Triton kernels for GPUs that are not there, by calling what launches them.

Triton asks its driver for which GPU to compile, and to load and launch what it has compiled. The
driver of this module names a GPU and launches nothing, so that the functions which launch kernels
run as they are, on meta tensors: what is compiled is what they would launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from bench.cubins import ARCHITECTURES, Resources, read_resources

WARP = 32
MOST_THREADS = 1024  # of a block


@dataclass(frozen=True)
class Launch:
    """A kernel as it was compiled for the first launch with its kind of arguments."""

    kernel: str
    arch: int
    warps: int
    stages: int
    constants: dict[str, Any]  # compile-time arguments by name
    compiled: str  # the key under which Triton keeps the machine code
    resources: Resources


class CompilingDriver:
    """A GPU of which nothing is known but its architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[Launch] = []
        self._seen: set[str] = set()
        self._compiled: Any = None  # of the kernel that is loaded next
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": ARCHITECTURES[arch].block_shared_bytes
            },
            load_binary=self._load,
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, WARP)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Called with each compiled kernel, just before it is loaded."""
        self._compiled = source, metadata
        return lambda *arguments, **options: None

    def _load(
        self, name: str, cubin: bytes, shared_bytes: int, device: int
    ) -> tuple[None, None, int, int, int]:
        _, metadata = self._compiled
        if metadata.hash not in self._seen:  # Triton loads again what has no module
            self._seen.add(metadata.hash)
            self._record(name, cubin, shared_bytes)
        return None, None, 0, 0, MOST_THREADS

    def _record(self, name: str, cubin: bytes, shared_bytes: int) -> None:
        source, metadata = self._compiled
        (static,) = read_resources(cubin).values()
        resources = replace(static, shared_bytes=static.shared_bytes + shared_bytes)
        constants = {
            parameter.name: source.constants[(parameter.num,)]
            for parameter in source.fn.params
            if parameter.is_constexpr
        }
        options = metadata.num_warps, metadata.num_stages
        self.launches.append(Launch(name, self.arch, *options, constants, metadata.hash, resources))


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Launch]]:
    """Within it, launching a Triton kernel compiles it for sm_`arch` and nothing else.

    The list that it yields grows by what is compiled; a kernel that this process has compiled
    before for the same architecture and kind of arguments is not there again.
    """
    compiling, before = CompilingDriver(arch), driver._active
    driver.set_active(compiling)
    try:
        yield compiling.launches
    finally:
        driver._active = before
