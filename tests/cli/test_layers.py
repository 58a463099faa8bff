"""How the words that name layers, heads and grids are read."""

from __future__ import annotations

import argparse

import pytest

from attn_kd.cli._layers import head_map, layer_selection, teacher_layers, token_grid
from attn_kd.errors import InputError


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("all", "all"),
        (
            "encoder.0=encoder.2 decoder.0=decoder.1",
            {"encoder.0": "encoder.2", "decoder.0": "decoder.1"},
        ),
        ("encoder.0=encoder.2 encoder.0=encoder.2", {"encoder.0": "encoder.2"}),
    ],
    ids=["by name", "pairs", "a pair twice"],
)
def test_layers_are_a_name_or_pairs(words, value):
    assert layer_selection(words.split()) == value


@pytest.mark.parametrize(
    "words", ["first", "last all", "last a=b", "a=", "=b", "a=b=c", "a"], ids=repr
)
def test_layers_of_another_form_are_refused_with_the_word(words):
    wrong = next(word for word in words.split() if word != "a=b")
    with pytest.raises(
        InputError, match=f"--layers '{wrong}' is no pair .* last or all alone, or "
    ):
        layer_selection(words.split())


def test_two_teachers_of_one_layer_are_refused_by_name():
    with pytest.raises(InputError, match="pairs 'a' with 'b' and with 'c'"):
        layer_selection(["a=b", "a=c"])


@pytest.mark.parametrize(
    ("words", "value"),
    [("last", "last"), ("a b", ["a", "b"]), ("s=a b", ["a", "b"])],
    ids=["by name", "paths", "pairs"],
)
def test_layers_of_a_teacher_alone(words, value):
    assert teacher_layers(words.split()) == value


@pytest.mark.parametrize(
    ("words", "value"),
    [("0,0,1,1", (0, 0, 1, 1)), ("a=1,0 b=0,1", {"a": (1, 0), "b": (0, 1)})],
    ids=["of all layers", "by layer"],
)
def test_head_maps_are_one_or_by_layer(words, value):
    assert head_map(words.split()) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("mean", "'mean' is no head map; .*--head-reduction mean"),
        ("0,,1", "'0,,1' is no head map"),
        ("0,-1", "'0,-1' is no head map"),
        ("=0,1", "'=0,1' is no head map"),
        ("0 2 4 6", "'0 2 4 6' has several maps for one layer; .*: 0,0,1,1 for all layers"),
        ("0,1 a=1,0", "'0,1 a=1,0' has several maps"),
        ("a=0,1 a=1,0", "'a=0,1 a=1,0' has several maps"),
    ],
    ids=["word", "gap", "negative", "no path", "spaces", "all and one", "a layer twice"],
)
def test_head_map_of_another_form_is_refused_by_value(words, message):
    with pytest.raises(InputError, match=f"--head-map {message}"):
        head_map(words.split())


@pytest.mark.parametrize(("text", "grid"), [("13x13", (13, 13)), ("4X7x9", (4, 7, 9))])
def test_grid_is_read(text, grid):
    assert token_grid(text) == grid


@pytest.mark.parametrize("text", ["13", "13,13", "0x13", "13x", "1x2x3x4", "axb"])
def test_grid_of_another_form_is_refused_by_value(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"such as 13x13, .*'{text}'"):
        token_grid(text)
