"""A model some of whose attention layers take taps for the length of a forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from attn_kd.distill.loans import Loans
from attn_kd.errors import InputError
from attn_kd.integrations.attention_modules import (
    SwitchedImplementation,
    configuration,
    untapped_implementation,
)
from attn_kd.nn.taps import TAPS_ARGUMENT, AttentionTaps, Tap

# Models that are tapped at the same time may share configurations, or be the same model.
_switched_configs: Loans[SwitchedImplementation] = Loans()


class TappedModel:
    """A model whose named attention modules call attn_kd, until `close`.

    Args:
        role: "teacher" or "student", for messages.
        model: a transformers model, or a wrapper that passes keyword arguments on to one.
        modules: the attention modules to tap, by their path in `model`.

    Raises:
        InputError: the model takes no further keyword arguments, or does not let its attention
            implementation be set; nothing is changed then.
    """

    def __init__(self, role: str, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        _check_passes_keywords(role, model)
        self._role = role
        self._model = model
        self._modules = dict(modules)
        with ExitStack() as changes:
            originals = [_switch(model, module, changes) for module in self._modules.values()]
            self._changes = changes.pop_all()
        self._untapped = untapped_implementation(originals)

    def run(
        self, inputs: Mapping[str, Any], taps: Mapping[str, Tap], through: nn.Module | None = None
    ) -> Any:
        """Return the output for keyword arguments `inputs`, with a tap per path in the layers.

        `through` is a wrapper of the model to be called in its place.
        """
        entries = [(module, taps[path]) for path, module in self._modules.items()]
        tapped = {TAPS_ARGUMENT: AttentionTaps(entries, self._untapped)}
        return (self._model if through is None else through)(**inputs, **tapped)

    def did_not_run(self, path: str) -> InputError:
        """Return the error for a layer whose tap was not called."""
        return InputError(
            f"{self._role} layer {path!r} did not run, or its model does not pass keyword "
            "arguments on to its attention layers"
        )

    def close(self) -> None:
        """Give the layers their own implementation back. Closing again does nothing."""
        self._changes.close()


def _switch(model: nn.Module, module: nn.Module, changes: ExitStack) -> str:
    """Make `module` call attn_kd until `changes` closes; return its own implementation."""
    config = configuration(module)
    switched = _switched_configs.take(config, partial(SwitchedImplementation, model, module))
    changes.callback(_switched_configs.give_back, config)
    return switched.original


def _check_passes_keywords(role: str, model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise InputError(
            f"{role} {type(model).__name__} takes no further keyword arguments in forward; "
            "expected a model that passes **kwargs on to its attention layers"
        )
