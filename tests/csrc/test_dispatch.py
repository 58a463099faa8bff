"""The choice of the kernels' instruction set."""

from __future__ import annotations

import pytest
import torch

import attn_kd
from attn_kd.ops.checks import DIVERGENCES
from tests.ops import explicit


def test_the_widest_supported_is_in_use(module):
    assert module.instruction_set() == module.supported_instruction_sets()[-1]


def test_supported_are_among_the_compiled(module):
    assert set(module.supported_instruction_sets()) <= set(module.compiled_instruction_sets())
    assert module.supported_instruction_sets()[0] == "baseline"


def test_set(module, instruction_set):
    assert module.instruction_set() == instruction_set
    assert instruction_set in attn_kd.available_backends()["cpu"].reason


@pytest.mark.usefixtures("instruction_set")
def test_the_kernels_know_the_divergences_of_the_reference(module):
    assert tuple(module.divergences()) == DIVERGENCES == tuple(explicit.DIVERGENCES)


def test_unknown_is_refused_and_changes_nothing(module):
    before = module.instruction_set()
    with pytest.raises(ValueError, match=r"'mmx' was not compiled; expected one of 'baseline'"):
        module.set_instruction_set("mmx")
    assert module.instruction_set() == before


def test_features_name_the_compiler(module):
    assert module.features()["compiler"]
    assert isinstance(module.features()["cuda"], bool)


@pytest.mark.parametrize("x", [torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.half)])
def test_exp2_of_another_dtype_is_refused(module, x):
    with pytest.raises(TypeError, match="float32 or float64"):
        module.exp2(x)


def test_short_exp2_of_doubles_is_refused(module):
    with pytest.raises(TypeError, match="float32"):
        module.short_exp2(torch.ones(3, dtype=torch.float64))
