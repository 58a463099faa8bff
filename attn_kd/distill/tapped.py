"""A model some of whose attention layers take taps for the length of a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from attn_kd.distill.loans import Loans
from attn_kd.errors import InputError
from attn_kd.integrations.attention_modules import carries_own_tap, is_dispatched
from attn_kd.nn.carriers import TapReservation, carried_taps
from attn_kd.nn.taps import TAPS_ARGUMENT, AttentionTaps, Tap

if TYPE_CHECKING:
    from attn_kd.integrations.transformers import SwitchedImplementation

# Models that are tapped at the same time may share configurations, or be the same model.
_switched_configs: Loans[SwitchedImplementation] = Loans()
_reserved_modules: Loans[TapReservation] = Loans()


class TappedModel:
    """A model whose named attention modules compute their attention by taps, until `close`.

    Taps travel as a keyword argument of the model where it hands its keywords down to the layer,
    and are carried by the layer where it does not (`carries_own_tap`).

    Args:
        role: "teacher" or "student", for messages.
        model: the model, or a wrapper around it.
        modules: the attention modules to tap, by their path in `model`.

    Raises:
        InputError: the model does not let its attention implementation be set; nothing is changed
            then.
    """

    def __init__(self, role: str, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self._role = role
        self._model = model
        carriers = {path for path in modules if carries_own_tap(model, path)}
        self._carriers = {path: modules[path] for path in modules if path in carriers}
        self._reached = {path: modules[path] for path in modules if path not in carriers}
        dispatched = [module for module in modules.values() if is_dispatched(module)]
        with ExitStack() as changes:
            for module in self._carriers.values():
                _reserved_modules.take(module, partial(TapReservation, module))
                changes.callback(_reserved_modules.give_back, module)
            self._untapped = _switch(model, dispatched, changes) if dispatched else ""
            self._changes = changes.pop_all()

    def run(
        self, inputs: Mapping[str, Any], taps: Mapping[str, Tap], through: nn.Module | None = None
    ) -> Any:
        """Return the output for keyword arguments `inputs`, with a tap per path in the layers.

        `through` is a wrapper of the model to be called in its place.
        """
        keywords: dict[str, Any] = {}
        if self._reached:
            entries = [(module, taps[path]) for path, module in self._reached.items()]
            keywords[TAPS_ARGUMENT] = AttentionTaps(entries, self._untapped)
        with carried_taps([(module, taps[path]) for path, module in self._carriers.items()]):
            return (self._model if through is None else through)(**inputs, **keywords)

    def did_not_run(self, path: str) -> InputError:
        """Return the error for a layer whose tap was not called."""
        return InputError(
            f"{self._role} layer {path!r} did not run, or its model does not pass keyword "
            "arguments on to its attention layers"
        )

    def close(self) -> None:
        """Give the layers their own implementation back. Closing again does nothing."""
        self._changes.close()


def _switch(model: nn.Module, modules: list[nn.Module], changes: ExitStack) -> str:
    """Make modules of transformers call attn_kd until `changes` closes.

    Return the implementation that the layers beside them use meanwhile.
    """
    # Only here, so that other models can be distilled without transformers.
    from attn_kd.integrations.transformers import (
        SwitchedImplementation,
        configuration,
        untapped_implementation,
    )

    originals = []
    for module in modules:
        config = configuration(module)
        switched = _switched_configs.take(config, partial(SwitchedImplementation, model, module))
        changes.callback(_switched_configs.give_back, config)
        originals.append(switched.original)
    return untapped_implementation(originals)
