"""Finding the attention layers of a transformers model, and switching their implementation."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from itertools import islice
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attn_kd.errors import InputError
from attn_kd.integrations.transformers import IMPLEMENTATION, register

_MOST_NAMED = 4
_KEY_SOURCES = ("key_value_states", "encoder_hidden_states")
_TAKES_OUR_MASKS = {"sdpa", IMPLEMENTATION}


def is_attention(module: nn.Module) -> bool:
    """Whether `module` computes its attention by a function that transformers looks up by name."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def is_self_attention(module: nn.Module) -> bool:
    """Whether the queries of an attention module come from the same tokens as its keys."""
    parameters = inspect.signature(type(module).forward).parameters
    return not any(name in parameters for name in _KEY_SOURCES)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of `model` by path, in the order of the model."""
    return {path: module for path, module in model.named_modules() if is_attention(module)}


def last_encoder_self_attention(model: nn.Module) -> str:
    """Return the path of the final encoder layer's self-attention (backbones do not count).

    Raises:
        InputError: the model has none; the message names attention modules that it has.
    """
    modules = attention_modules(model)
    for path, module in reversed(modules.items()):
        components = path.split(".")
        in_encoder = "encoder" in components and "backbone" not in components
        if in_encoder and is_self_attention(module):
            return path
    raise InputError(
        f"{type(model).__name__} has no encoder self-attention to distil by default; name the "
        f"layers ({listing(modules)})"
    )


def configuration(module: nn.Module) -> PreTrainedConfig:
    """Return the configuration object by which `module`, an attention module, is dispatched."""
    return cast(PreTrainedConfig, module.config)


def listing(paths: Collection[str]) -> str:
    """Return a phrase that names the first attention modules of a model."""
    if not paths:
        return "it has no attention module that transformers dispatches"
    named = ", ".join(repr(path) for path in islice(paths, _MOST_NAMED))
    more = f", and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return f"its attention modules are {named}{more}"


class SwitchedImplementation:
    """An attention module of a model made to call attn_kd, until `undo`.

    Layers that share the module's configuration object are switched with it. `original` is the
    name of the implementation they had.

    Raises:
        InputError: the model does not let its implementation be set.
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        register()
        config = configuration(module)
        self._owner = _owner(model, config)
        self.original: str = config._attn_implementation
        # The empty key is the owner's own configuration; sub-configurations keep what they have.
        self._owner.set_attn_implementation({"": IMPLEMENTATION})
        if config._attn_implementation != IMPLEMENTATION:
            raise InputError(
                f"{type(self._owner).__name__} does not let its attention implementation be set; "
                "attn_kd cannot distil it"
            )

    def undo(self) -> None:
        """Give the layers their original implementation back."""
        self._owner.set_attn_implementation({"": self.original})


def untapped_implementation(originals: Iterable[str]) -> str:
    """Return the implementation that the layers beside the tapped ones use meanwhile.

    It is their original one where that is known to take attn_kd's masks, else "sdpa".
    """
    names = set(originals)
    return names.pop() if len(names) == 1 and names <= _TAKES_OUR_MASKS else "sdpa"


def _owner(model: nn.Module, config: PreTrainedConfig) -> PreTrainedModel:
    for candidate in model.modules():
        if isinstance(candidate, PreTrainedModel) and candidate.config is config:
            return candidate
    raise InputError(f"{type(model).__name__} has no PreTrainedModel that owns the distilled layer")
