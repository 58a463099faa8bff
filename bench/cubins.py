"""What a compiled kernel needs of a multiprocessor, read from its cubin."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path


@dataclass(frozen=True)
class Architecture:
    """A multiprocessor's limits (CUDA C++ programming guide, technical specifications)."""

    name: str
    block_shared_bytes: int  # the most that one block may have, opted in
    shared_bytes: int  # of all blocks, of which the system takes RESERVED_SHARED from each


ARCHITECTURES = {
    80: Architecture("sm_80", 163 * 1024, 164 * 1024),
    90: Architecture("sm_90", 227 * 1024, 228 * 1024),
    100: Architecture("sm_100", 227 * 1024, 228 * 1024),
}
# The same on all three.
REGISTERS, WARPS, BLOCKS = 64 * 1024, 64, 32
RESERVED_SHARED = 1024
REGISTER_UNIT = 256  # registers are given to a warp in such pieces


@dataclass(frozen=True)
class Resources:
    """What one kernel needs."""

    registers: int  # a thread
    stack_bytes: int  # a thread: spilled registers, and arrays that are indexed at run time
    local_bytes: int  # a thread
    shared_bytes: int  # a block
    threads: int | None = None  # a block's, where the kernel is compiled for no more

    @property
    def spilled_bytes(self) -> int:
        """Bytes of local memory that a thread uses."""
        return self.stack_bytes + self.local_bytes

    @property
    def spills(self) -> bool:
        """Whether a thread uses local memory."""
        return self.spilled_bytes > 0

    def blocks(self, arch: int, warps: int) -> int:
        """Blocks of that many warps that a multiprocessor can hold at a time."""
        by_warp = -(-32 * self.registers // REGISTER_UNIT) * REGISTER_UNIT
        shared = self.shared_bytes + RESERVED_SHARED
        return min(
            REGISTERS // (by_warp * warps),
            ARCHITECTURES[arch].shared_bytes // shared,
            WARPS // warps,
            BLOCKS,
        )


def cuobjdump() -> str | None:
    """The program that reads cubins: of the CUDA toolkit, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


def read_resources(cubin: bytes) -> dict[str, Resources]:
    """Resources of every kernel of a cubin, by its symbol.

    Shared memory that a launch asks for is not in there.

    Raises:
        RuntimeError: there is no cuobjdump.
    """
    program = cuobjdump()
    if program is None:
        raise RuntimeError("no cuobjdump: it comes with Triton and with the CUDA toolkit")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, "--dump-resource-usage", "--dump-elf", file.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse_resources(dump)


def parse_resources(dump: str) -> dict[str, Resources]:
    """Parse what ``cuobjdump --dump-resource-usage --dump-elf`` has printed."""
    threads = {
        symbol: prod(int(size, 16) for size in sizes.split())
        for symbol, sizes in re.findall(
            r"^\.nv\.info\.(\S+)$(?:(?!^\.).)*?EIATTR_MAX_THREADS\s.*?Value:\s*(.*?)$",
            dump,
            re.MULTILINE | re.DOTALL,
        )
    }
    found = {}
    for symbol, line in re.findall(r"^ *Function (\S+):\n *(.*)$", dump, re.MULTILINE):
        amounts = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
        found[symbol] = Resources(
            registers=amounts["REG"],
            stack_bytes=amounts["STACK"],
            local_bytes=amounts["LOCAL"],
            shared_bytes=amounts["SHARED"],
            threads=threads.get(symbol),
        )
    return found
