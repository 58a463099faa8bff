"""What imports what: optional packages stay optional, and subpackages look downward only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import attn_kd

PACKAGE = Path(attn_kd.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

OPTIONAL_PACKAGES = {
    *("transformers", "accelerate", "safetensors", "tensorboard", "triton"),
    *("matplotlib", "scipy", "PIL", "faster_coco_eval", "pycocotools"),
}

# A subpackage may import itself, and whatever stands in a line below its own.
LAYERS = (
    {"cli"},
    {"report"},
    {"training", "inference"},
    {"distill", "models", "data"},
    {"integrations"},
    {"nn"},
    {"ops"},
    {"errors", "_atomic", "_locking", "_build", "_nvidia", "_C", "kernels"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules_loaded_by(statement: str) -> set[str]:
    """Return the top-level modules in sys.modules after a statement in a fresh interpreter."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_importing_attn_kd_adds_only_itself_to_what_torch_imports():
    added = modules_loaded_by("import attn_kd") - modules_loaded_by("import torch, numpy")
    assert added - set(sys.stdlib_module_names) == {"attn_kd"}


@pytest.mark.parametrize("module", ["attn_kd.cli", "attn_kd.cli.info", "attn_kd.nn"])
def test_light_modules_import_no_optional_package(module):
    assert not modules_loaded_by(f"import {module}") & OPTIONAL_PACKAGES


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, attn_kd
x = torch.randn(1, 1, 4, 8)
attn_kd.attention_kl(x, x, x, x, x)
print(attn_kd.available_backends()["triton"].reason, file=sys.stderr)
try:
    attn_kd.attention_kl(x, x, x, x, x, backend="triton")
except attn_kd.errors.InputError as error:
    print(error, file=sys.stderr)
"""


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_without_triton_the_rest_works_and_says_what_is_missing(interpret):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    reason, error = result.stderr.splitlines()
    assert "triton" in reason
    assert error == f"backend='triton' cannot run here: {reason}"


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the absolute names of the modules of attn_kd that a file imports."""
    package = ["attn_kd", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *filter(None, [node.module])])
            # "from attn_kd import data" names a subpackage in its second half.
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "attn_kd")


def subpackage_of(module: str) -> str:
    """Return the subpackage a module name leads to; what attn_kd itself exports counts as ops."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "ops"


@pytest.mark.parametrize("subpackage", sorted(set(RANK) - {"_C", "kernels"}))
def test_imports_point_downward(subpackage):
    upward = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in MODULES
        if path.relative_to(PACKAGE).with_suffix("").parts[0] == subpackage
        for module in imported_modules(path)
        if subpackage_of(module) != subpackage and RANK[subpackage_of(module)] <= RANK[subpackage]
    ]
    assert not upward


def test_every_subpackage_has_a_layer():
    top_level = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in MODULES}
    assert top_level - {"__init__", "__main__"} <= set(RANK)


def test_only_the_command_line_prints():
    calls = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in MODULES
        if path.relative_to(PACKAGE).parts[0] != "cli"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert not calls


def test_integrations_are_found_by_their_names():
    program = "import attn_kd\nprint(attn_kd.integrations.dab_detr.replace_attention)"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'dabdetr'"):
        attn_kd.integrations.dabdetr  # noqa: B018
