"""The instructions that the CUDA kernels were compiled to."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property

from bench.cubins import cuobjdump
from bench.nvcc_cubins import SOURCES, compile_cubin

# As the Itanium ABI mangles attention_kl_forward<Shape<Element, head_dim, row_warps>, teacher>.
SYMBOL = re.compile(
    r"attention_kl_(?P<direction>forward|backward)I.*?\d(?P<element>B?Float16)"
    r"ELi(?P<head_dim>\d+)ELi(?P<row_warps>\d)EEEL(?:NS0_7TeacherE|b)(?P<teacher>\d)E"
)
# Its address, perhaps a predicate, and its name with all that says what kind it is.
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z][\w.]*)", re.MULTILINE
)


@dataclass(frozen=True)
class Kernel:
    """An instance of a kernel's template, and its code."""

    direction: str  # "forward" or "backward"
    element: str  # "BFloat16" or "Float16"
    head_dim: int
    row_warps: int  # of a block
    teacher: int  # forward: none, one whose LSE is known, or unknown; backward: none or one
    code: str = field(repr=False)  # the listing

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each stands in the code."""
        return Counter(INSTRUCTION.findall(self.code))

    def count(self, prefix: str) -> dict[str, int]:
        """How often the instructions occur whose names begin like that."""
        return {name: n for name, n in self.instructions.items() if name.startswith(prefix)}

    @property
    def maps(self) -> int:
        """The student's logits and, if there is a teacher, its own."""
        return 1 + (self.teacher > 0)

    @property
    def warp_columns(self) -> int:
        """The columns of a tile that a warp of the forward pass has."""
        tile_columns, column_warps = 256 // (self.head_dim // 8), 8 // self.row_warps
        return tile_columns // column_warps


@cache
def kernels_for(arch: int) -> tuple[Kernel, ...]:
    """All kernels of the CUDA C++ backend, compiled for sm_`arch`."""
    listings = (disassemble(compile_cubin(source, arch)) for source in SOURCES)
    return tuple(_kernel(symbol, code) for listing in listings for symbol, code in listing.items())


def _kernel(symbol: str, code: str) -> Kernel:
    found = SYMBOL.search(symbol)
    assert found is not None, symbol
    sizes = {name: int(found[name]) for name in ("head_dim", "row_warps", "teacher")}
    return Kernel(found["direction"], found["element"], **sizes, code=code)


def disassemble(cubin: bytes) -> dict[str, str]:
    """The listing of every function by its symbol."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), "--dump-sass", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    _, *rest = re.split(r"^\s*Function : (\S+)$", listing, flags=re.MULTILINE)
    return dict(zip(rest[::2], rest[1::2], strict=True))
