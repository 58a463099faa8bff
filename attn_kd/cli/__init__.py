"""The command line ``attn-kd``: one module per command, imported when its command is called.

Command ``some-name`` is the module ``attn_kd.cli.some_name``. It has a docstring (shown by
``--help``), ``add_arguments(parser) -> None`` and ``run(args) -> int``. What every command shares
is done here once: the options of :func:`attn_kd.cli._arguments.add_common_arguments`, and the way
failures end. Whatever the user can mend (:class:`~attn_kd.errors.InputError`, what the system
refuses, an optional package that is not installed) is one line on stderr and exit code 2; Ctrl-C is
one line and exit code 130; a defect of the library keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NoReturn, TextIO

import attn_kd
from attn_kd.cli import _arguments
from attn_kd.errors import InputError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@dataclass(frozen=True)
class Command:
    """A command of ``attn-kd``: its name and what it does, in one line."""

    name: str
    summary: str

    def load(self) -> ModuleType:
        return importlib.import_module(f"attn_kd.cli.{self.name.replace('-', '_')}")


COMMANDS = (
    Command("demo", "the main job, small: teacher, baseline and distilled student, with a report"),
    Command("simulate", "write simulated ultrasound needle clips as a COCO data folder"),
    Command("train", "train a detector: a teacher, or a plain baseline"),
    Command("distill", "train a student with a teacher's attention"),
    Command("cache-teacher", "keep what a teacher makes of images, to distil without running it"),
    Command("eval", "measure a detector by the COCO metrics"),
    Command("predict", "detect objects in images, folders of images and videos"),
    Command("info", "show versions, backends and why others are refused"),
)

# The package that an import statement names -> the extra of attn_kd that brings it.
_EXTRA_OF_PACKAGE = {
    "PIL": "detr",
    "accelerate": "detr",
    "faster_coco_eval": "detr",
    "pycocotools": "detr",
    "safetensors": "detr",
    "scipy": "detr",
    "transformers": "detr",
    "matplotlib": "report",
    "triton": "gpu",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``attn-kd`` with ``argv`` (default: ``sys.argv[1:]``) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"attn-kd {attn_kd.__version__}")
        return 0
    command = next((known for known in COMMANDS if known.name == argv[0]), None)
    if command is None:
        return _fail("attn-kd", _unknown_command(argv[0]))
    return _run(command, argv[1:])


def _run(command: Command, argv: list[str]) -> int:
    program = f"attn-kd {command.name}"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            module = command.load()
            args = build_parser(command, module).parse_args(argv)
            _arguments.apply_common_arguments(args)
            code = module.run(args)
            sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's last breath
            return code
    except InputError as error:
        return _fail(program, str(error))
    except ModuleNotFoundError as error:
        if _extra_for(error) is None:
            raise
        return _fail(program, _missing_package(error))
    except BrokenPipeError:
        # The reader has gone (`| head`): say nothing, and keep Python from flushing into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "  # a full disk has none
        return _fail(program, f"{where}{error.strerror or error}")
    except KeyboardInterrupt as interruption:
        # Whoever can go on later says how in the exception's message.
        remark = f"; {interruption}" if str(interruption) else ""
        print(f"\n{program}: interrupted{remark}", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser(command: Command, module: ModuleType) -> argparse.ArgumentParser:
    """The parser of one command: what its module adds, then the options all commands share."""
    parser = _Parser(
        prog=f"attn-kd {command.name}",
        description=(module.__doc__ or command.summary).strip(),
        formatter_class=_HelpFormatter,
    )
    module.add_arguments(parser)
    _arguments.add_common_arguments(parser)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is one line on stderr instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {_one_line(message)} (see --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the paragraphs of a description and names the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        # By identity: the default 0 says something, though it equals False.
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if text is None or silent or action.required or "%(default)" in text:
            return text
        return f"{text} (default: %(default)s)"


def _overview() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = [
        "usage: attn-kd COMMAND [options]",
        "",
        "Distil the attention of a large detection transformer into a small one.",
        "",
        "commands:",
        *(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS),
        "",
        "options:",
        "  -h, --help     show this help; `attn-kd COMMAND --help` shows a command's options",
        "  -V, --version  show the version",
    ]
    return "\n".join(lines)


def _unknown_command(name: str) -> str:
    names = [command.name for command in COMMANDS]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
    return f"unknown command {name!r}; {hint}"


def _extra_for(error: ModuleNotFoundError) -> str | None:
    return _EXTRA_OF_PACKAGE.get((error.name or "").partition(".")[0])


def _missing_package(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    extra = _extra_for(error)
    return f"needs the package {package!r}; install it with: pip install 'attn_kd[{extra}]'"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"attn-kd: warning: {_one_line(str(message))}", file=file or sys.stderr)


def _fail(program: str, message: str) -> int:
    print(f"{program}: error: {_one_line(message)}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _one_line(message: str) -> str:
    return " ".join(message.split())
