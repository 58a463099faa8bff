"""Build of the optional extension ``attn_kd._C``; the declarative metadata is in pyproject.toml.

The package is complete without the extension (the reference backend is plain torch), so nothing
that goes wrong here may keep it from being installed. The reason goes to the output of the build,
which pip shows with ``-v`` alone, and to ``attn_kd/_build.json``, from where the warning of the
first call and ``attn-kd info`` tell it. ``ATTN_KD_BUILD_EXTENSION`` changes that: ``auto``
(default), ``never``, or ``require`` (a failure to build is an error; for development). Where torch
has CUDA and there is an nvcc, the extension contains the CUDA kernels too; where these cannot be
built, it is built without them, and the record says why. ``ATTN_KD_BUILD_CUDA`` takes the same
three values: ``require`` makes an extension without CUDA kernels an error.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# No -march=native: a wheel runs on machines other than the one that built it. Contraction to FMA
# and a branch-free exp need the last three; none of them changes the treatment of inf or nan.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]

# Extensions are compiled with the flags of Python itself, and it is built with -fwrapv, or with
# -fno-strict-overflow, which implies it: 3 % of a bfloat16 forward pass. Its -g goes too: of
# kernels compiled several times debugging information would be most of the library.
KERNEL_FLAGS = ["-g0", "-fno-wrapv", "-fstrict-overflow"]

NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"]

# csrc/cpu/kernels/*.cpp is compiled once per entry, with ATTN_KD_ISA naming the namespace. The
# order is the link order: an inline function that several variants instantiate is kept from the
# first object that defines it, which must be one that every machine can run.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *INSTRUCTION_SETS["avx2"],
        "-mprefer-vector-width=512",
        # GCC 12 gives these for its own intrinsics, by the hundred; other instruction sets keep
        # them.
        *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    ]
    INSTRUCTION_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]


class BuildObstacleError(Exception):
    """The extension is left out; the message is the reason as the user will read it."""


def build_mode(part: str = "EXTENSION") -> str:
    """Return auto, never or require, as ATTN_KD_BUILD_EXTENSION or _CUDA says."""
    mode = os.environ.get(f"ATTN_KD_BUILD_{part}", "auto")
    if mode not in ("auto", "never", "require"):
        sys.exit(f"ATTN_KD_BUILD_{part}={mode!r}: expected auto, never or require")
    return mode


def import_torch() -> ModuleType:
    """Return the torch to build against: the one the extension will be loaded into.

    Build isolation hides it, and naming torch as a build requirement would download gigabytes to
    compile against a torch that need not be the installed one. pip runs an isolated build with
    the interpreter of the environment it installs into, so torch is found through sysconfig.
    Front ends that isolate in an environment of their own need their --no-build-isolation.
    """
    target = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if any(Path(path, "torch").is_dir() for path in target):
        sys.path.extend(target - set(sys.path))
    try:
        import torch
    except (ImportError, OSError) as error:
        raise BuildObstacleError(
            f"torch could not be imported during the build ({error}); with torch installed, run "
            "pip install --no-build-isolation --no-deps --force-reinstall --no-cache-dir "
            "on attn_kd again"
        ) from error
    minimum = minimum_torch()
    if torch.__version__ < minimum:
        raise BuildObstacleError(f"torch is {torch.__version__}, at least {minimum} is needed")
    return torch


def minimum_torch() -> str:
    """Return the lowest version that pyproject.toml allows (by hand: tomllib needs Python 3.11)."""
    (minimum,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return minimum


def check_compiler(compiler_type: str) -> None:
    """Raise BuildObstacleError where the C++ compiler is known to be of no use.

    clang on Linux: the OpenMP calls it emits are those of libomp, torch brings GCC's libgomp. The
    extension would link and then never load, or, with libomp linked in, run a second pool of
    threads beside torch's.
    """
    if compiler_type != "unix":
        raise BuildObstacleError(f"{compiler_type} compilers are not supported yet")
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        raise BuildObstacleError(f"no C++ compiler: {command[0]} was not found (CXX names another)")
    if sys.platform == "linux":
        # By its macros and not by its name: c++ may be either.
        macros = subprocess.run(
            [*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
        ).stdout
        if "__clang__" in macros:
            raise BuildObstacleError(
                f"{command[0]} is clang, whose OpenMP is not the one of torch for Linux: "
                "set CXX to g++"
            )


def sources(*patterns: str) -> list[str]:
    """Return the files matching the patterns, relative to the root as setuptools wants them."""
    paths = (path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(path.as_posix() for path in paths)


def nvcc_release() -> tuple[int, int] | None:
    """Return major and minor version of the CUDA toolkit that torch would build with, if any."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME is not None else None
    if nvcc is None or not nvcc.exists():
        return None
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:  # not for this machine, or not executable
        return None
    release = re.search(r"release (\d+)\.(\d+)", version)
    return None if release is None else (int(release[1]), int(release[2]))


def cuda_obstacle(torch: ModuleType) -> str | None:
    """Say why there cannot be CUDA kernels: they take a CUDA build of torch and its toolkit."""
    if build_mode("CUDA") == "never":
        return "ATTN_KD_BUILD_CUDA=never"
    if torch.version.cuda is None:
        return "torch is a CPU build"
    release = nvcc_release()
    if release is None:
        return "no nvcc"
    if str(release[0]) != torch.version.cuda.split(".")[0]:
        return "nvcc {}.{} against CUDA {} of torch".format(*release, torch.version.cuda)
    return None


def gpu_code_flags() -> list[str]:
    """Return for which GPUs nvcc makes code, instead of for those of the building machine.

    Code for 8.0 runs on 8.x; its PTX is translated for GPUs that have no code of their own.
    """
    code = {"80": "[sm_80,compute_80]", "90a": "sm_90a"}
    if (nvcc_release() or (0, 0)) >= (12, 8):
        code["100"] = "sm_100"
    return [f"-gencode=arch=compute_{arch},code={made}" for arch, made in code.items()]


def define_extension(torch: ModuleType | None, *, with_cuda: bool) -> Extension:
    """Describe the extension; without torch only so that the files reach a source archive."""
    main = sources("csrc/*.cpp", "csrc/cpu/*.cpp")
    cuda = sources("csrc/cuda/*.cpp", "kernels/cuda/*.cu")
    rest = sources("csrc/**/*.*", "kernels/cuda/*.*")
    if torch is None:
        return Extension("attn_kd._C", main, depends=rest)

    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    features = [f"-DATTN_KD_HAVE_{name.upper()}" for name in INSTRUCTION_SETS]
    if with_cuda:
        features.append("-DATTN_KD_HAVE_CUDA")
    # at::parallel_for is serial in files compiled without OpenMP. It is not a link flag: the
    # symbols resolve to the OpenMP runtime torch has loaded, so that there is one thread pool.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    # Read by nobody: a changed command line is what recompiles for another torch, whose headers
    # need not be newer files.
    built_for = f"-DATTN_KD_BUILT_FOR_TORCH={torch.__version__}"
    make = CUDAExtension if with_cuda else CppExtension
    return make(
        "attn_kd._C",
        main + cuda if with_cuda else main,
        include_dirs=[str(ROOT / "csrc"), str(ROOT)],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, "-g0", *openmp, *features, built_for],
            "nvcc": [*NVCC_FLAGS, *gpu_code_flags(), *features] if with_cuda else [],
        },
        depends=rest,
    )


def build_command(
    torch: ModuleType | None, obstacle: BuildObstacleError | None, no_cuda: str | None
) -> type[build_ext]:
    """Return the build_ext command: torch's where there is one, made optional and multi-variant.

    The extension has CUDA kernels unless `no_cuda` says why not.
    """
    base: Any = build_ext
    if torch is not None:
        from torch.utils.cpp_extension import BuildExtension

        base = BuildExtension

    class BuildOptionalExtension(base):
        def run(self) -> None:
            if self.inplace and build_mode() == "never":
                return  # what an earlier build left in the source tree stays
            inplace = self.inplace
            reason, without_cuda = None, None
            try:
                if obstacle is not None:
                    raise obstacle
                self.force = True  # to link; ninja compiles what has changed
                without_cuda = self.run_with_or_without_cuda()
            # Whatever the toolchain raises (a missing compiler, a failed ninja, a refused ABI
            # check each has its own type), the answer is the same: go on without the extension.
            except Exception as error:
                modes = (build_mode(), build_mode("CUDA"))
                if modes[0] != "never" and "require" in modes:
                    raise
                cause = "" if isinstance(error, BuildObstacleError) else "the build failed: "
                reason = cause + in_one_line(error)
                # An extension left by an earlier build would be taken for this one's.
                for self.inplace in (False, inplace):
                    for ext in self.extensions:
                        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                self.warn(f"attn_kd is installed without its compiled kernels: {reason}")
            folder = ROOT if inplace else Path(self.build_lib)
            record_build(folder / "attn_kd" / "_build.json", reason, without_cuda, torch)

        def run_with_or_without_cuda(self) -> str | None:
            """Build, without the CUDA kernels where it fails with them; return why without."""
            mode = build_mode("CUDA")
            if no_cuda is not None:
                if mode == "require":
                    raise BuildObstacleError(f"ATTN_KD_BUILD_CUDA=require: {no_cuda}")
                super().run()
                return no_cuda
            compiler, inplace = self.compiler, self.inplace
            try:
                super().run()
                return None
            except BuildObstacleError:  # of the C++ compiler
                raise
            except Exception as error:  # as many types as above
                if mode == "require":
                    raise
                failure = f"the build of the CUDA kernels failed: {in_one_line(error)}"
            self.warn(f"attn_kd is built again without CUDA kernels: {failure}")
            self.compiler, self.inplace = compiler, inplace  # a run that fails leaves its own
            for ext in self.extensions:  # setuptools has put attributes of its own on them
                vars(ext).update(vars(define_extension(torch, with_cuda=False)))
            super().run()
            return failure

        def build_extensions(self) -> None:
            check_compiler(self.compiler.compiler_type)
            super().build_extensions()

        def build_extension(self, ext: Extension) -> None:
            for name, flags in INSTRUCTION_SETS.items():
                ext.extra_objects += self.compiler.compile(
                    sources("csrc/cpu/kernels/*.cpp"),
                    output_dir=os.path.join(self.build_temp, name),
                    include_dirs=[str(ROOT / "csrc")],
                    extra_postargs=[*CXX_FLAGS, *KERNEL_FLAGS, *flags, f"-DATTN_KD_ISA={name}"],
                )
            super().build_extension(ext)

    return BuildOptionalExtension


def in_one_line(error: Exception) -> str:
    """What an error says; of a command of a hundred files, how it begins and how it ended."""
    text = " ".join(str(error).split())
    if len(text) <= 500:
        return text
    return f"{text[:120]} … {text[-160:]} (pip install -v shows what it printed)"


def record_build(
    path: Path, reason: str | None, without_cuda: str | None, torch: ModuleType | None
) -> None:
    """Write what the build did, for attn_kd._build to read."""
    facts = {
        "extension": reason is None,
        "reason": reason,
        "torch": None if torch is None else str(torch.__version__),
        "cuda": without_cuda,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    torch, obstacle, no_cuda = None, None, None
    try:
        build_mode("CUDA")  # a wrong value is refused whatever follows
        if build_mode() == "never":
            raise BuildObstacleError("ATTN_KD_BUILD_EXTENSION=never was set for the build")
        torch = import_torch()
        no_cuda = cuda_obstacle(torch)
    except BuildObstacleError as error:
        obstacle = error
    setup(
        # Device code is the top-level folder kernels/, installed as attn_kd.kernels.
        packages=[
            *find_packages(include=["attn_kd", "attn_kd.*"]),
            "attn_kd.kernels",
            *(f"attn_kd.kernels.{name}" for name in find_packages("kernels")),
        ],
        package_dir={"attn_kd": "attn_kd", "attn_kd.kernels": "kernels"},
        ext_modules=[define_extension(torch, with_cuda=no_cuda is None)],
        cmdclass={"build_ext": build_command(torch, obstacle, no_cuda)},
    )


main()
