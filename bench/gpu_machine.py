"""What an environment lacks for steps of gpu_session.sh, said before the first of them.

    python -m bench.gpu_machine build gpu bench

A step that fails for want of a package would do so minutes later, on a machine that may be lent.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL_STEPS = ("torch", "triton", "numpy")
# Modules that a step needs besides; of what its tests need more, they skip.
STEPS = {
    "build": ("pip", "setuptools", "ninja"),
    "gpu": ("pytest", "hypothesis"),
    "sanitize": (),
    "bench": ("pytest", "pytest_benchmark", "transformers"),
    "tune": (),
    "tests": ("pytest", "hypothesis"),
    "resources": (),
}
INSTALL = (
    f"ATTN_KD_BUILD_EXTENSION=never {sys.executable} -m pip install --no-build-isolation "
    "--no-deps --editable ."
)


def lacking(steps: Sequence[str]) -> list[str]:
    """What is missing, a line each; nothing where all steps can run."""
    needed = dict.fromkeys((*ALL_STEPS, *(name for step in steps for name in STEPS[step])))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return [f"{sys.executable} has no {', '.join(missing)}"]
    lines = [] if "build" in steps else _installed_elsewhere()
    import torch

    if not torch.cuda.is_available():
        lines.append(f"{sys.executable} finds no GPU")
    return lines


def _installed_elsewhere() -> list[str]:
    """Say where the device code is not this checkout's; the step `build` installs that.

    The package is found in the working folder, but its device code where it is installed: of
    another checkout, other kernels would be measured than those that are here.
    """
    kernels = importlib.util.find_spec("attn_kd.kernels")
    places = [] if kernels is None else kernels.submodule_search_locations or []
    if ROOT / "kernels" in [Path(place).resolve() for place in places]:
        return []
    return [f"attn_kd is not installed from {ROOT}; there: {INSTALL}"]


def main(steps: Sequence[str]) -> int:
    lines = lacking(steps)
    for line in lines:
        print(f"gpu_session.sh: {line}", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
