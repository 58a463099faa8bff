"""Finding the attention layers of a model that attn_kd can compute, and what kind each is.

Two sorts of modules count: those of transformers that look their attention function up by name, and
attn_kd's own (`attn_kd.nn.TapCarrier`). Nothing here needs transformers to be installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from itertools import islice

from torch import nn

from attn_kd.nn.carriers import TapCarrier, is_self_attention_name

_MOST_NAMED = 4
_KEY_SOURCES = ("key_value_states", "encoder_hidden_states")


def is_dispatched(module: nn.Module) -> bool:
    """Whether `module` computes its attention by a function that transformers looks up by name."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def is_attention(module: nn.Module) -> bool:
    """Whether attn_kd can compute the attention of `module`."""
    return isinstance(module, TapCarrier) or is_dispatched(module)


def is_self_attention(module: nn.Module, path: str = "") -> bool:
    """Whether the queries of an attention module come from the same tokens as its keys.

    Modules of transformers tell by the inputs they take, attn_kd's own by `self_attention` where
    it is set; those that take query, key and value go by the name in `path`.
    """
    if isinstance(module, TapCarrier) and module.self_attention is not None:
        return module.self_attention
    parameters = inspect.signature(type(module).forward).parameters
    if isinstance(module, TapCarrier) or "key" in parameters:
        return is_self_attention_name(path)
    return not any(name in parameters for name in _KEY_SOURCES)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules of `model` by path, in the order of the model."""
    return {path: module for path, module in model.named_modules() if is_attention(module)}


def attention_kinds(model: nn.Module) -> dict[str, str]:
    """Return the kind of every attention module by path, in the order of the model.

    "encoder_self", "decoder_self" or "decoder_cross" (or "encoder_cross", in fusion layers). The
    nearest ancestor with "encoder" or "decoder" in its name or class decides; causal attention is a
    decoder's, and a model without either, such as ViT, is an encoder. Layers of a backbone are
    "backbone_self", except where the model has no other encoder, as in RF-DETR and LW-DETR.
    """
    kinds = {}
    for path, module in attention_modules(model).items():
        side = _side(model, path)
        if getattr(module, "is_causal", False):
            side = "decoder"
        elif side == "encoder" and _in_backbone(model, path):
            side = "backbone"
        kinds[path] = f"{side}_{'self' if is_self_attention(module, path) else 'cross'}"
    if "encoder_self" not in kinds.values() and not _deformable(model, "encoder"):
        kinds = {path: kind.replace("backbone", "encoder") for path, kind in kinds.items()}
    return kinds


def layers_of_kind(model: nn.Module, kind: str) -> list[str]:
    """Return the paths of the attention modules of one kind, as in `attention_kinds`."""
    return [path for path, found in attention_kinds(model).items() if found == kind]


def without_kind(model: nn.Module, kind: str) -> str:
    """Return a sentence that says why `layers_of_kind` is empty and names what the model has."""
    side, relation = kind.split("_")
    sentence = f"{type(model).__name__} has no {side} {relation}-attention to distil"
    # Where there is deformable attention it takes the place of attention over an image's tokens.
    reason = _deformable(model, side) if kind in ("encoder_self", "decoder_cross") else None
    if reason is None:
        reason = next((p for p, module in model.named_modules() if _replacement(module)), None)
    if reason is not None:
        sentence += f": {reason!r} {not_attention(model.get_submodule(reason))}"
    return f"{sentence} ({listing(attention_modules(model))})"


def not_attention(module: nn.Module) -> str:
    """Return the rest of a sentence that says why `module` cannot be distilled."""
    name = type(module).__name__
    if _is_deformable(module):
        return (
            f"is deformable attention ({name}): it weighs a few sampled points per query, so there "
            "is no map over the keys to distil"
        )
    replacement = _replacement(module)
    if replacement is not None:
        return f"is a {name}, not an attention module of attn_kd; {replacement}(model) makes it one"
    return f"is a {name}, not an attention module"


def _replacement(module: nn.Module) -> str | None:
    """Return the function that makes `module` an attention module of attn_kd, if there is one."""
    if is_attention(module):
        return None
    if isinstance(module, nn.MultiheadAttention):
        return "attn_kd.nn.replace_multihead_attention"
    of_dab_detr = type(module).__module__.endswith(".modeling_dab_detr")
    if of_dab_detr and type(module).__name__ in ("DetrAttention", "DabDetrAttention"):
        return "attn_kd.integrations.dab_detr.replace_attention"
    return None


def listing(paths: Collection[str]) -> str:
    """Return a phrase that names the first attention modules of a model."""
    if not paths:
        return "it has no attention module that attn_kd can compute"
    named = ", ".join(repr(path) for path in islice(paths, _MOST_NAMED))
    more = f", and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return f"its attention modules are {named}{more}"


def carries_own_tap(model: nn.Module, path: str) -> bool:
    """Whether the attention module at `path` must carry its tap, for no keyword reaches it.

    Taps travel as a keyword argument of the model where every module on the way takes further
    keywords. attn_kd's own modules take none, and some models of transformers hand none down:
    YOLOS to its layers, RF-DETR and LW-DETR to their backbone.
    """
    if isinstance(model.get_submodule(path), TapCarrier):
        return True
    return not all(_takes_keywords(module) for _, module in _lineage(model, path))


def _lineage(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules from `model` to the one at `path`, each with its name in its parent."""
    yield "", model
    for name in path.split(".") if path else ():
        model = model.get_submodule(name)
        yield name, model


def _takes_keywords(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return True  # never called
    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _side(model: nn.Module, path: str) -> str:
    """Return "encoder" or "decoder", whichever the module at `path` is part of."""
    # The module's own name says where its keys come from: `encoder_attn` is a decoder's.
    ancestors = list(_lineage(model, path))[:-1]
    for name, module in reversed(ancestors):
        text = f"{name} {type(module).__name__}".lower()
        sides = [side for side in ("encoder", "decoder") if side in text]
        if len(sides) == 1:
            return sides[0]
    return "encoder"


def _in_backbone(model: nn.Module, path: str) -> bool:
    return any("backbone" in name for name, _ in _lineage(model, path))


def _is_deformable(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Deformable" in name and name.endswith("Attention")


def _deformable(model: nn.Module, side: str) -> str | None:
    """Return the path of the last deformable attention on one side of a model."""
    paths = [
        path
        for path, module in model.named_modules()
        # Its inner part, which samples, is deformable by name as well.
        if _is_deformable(module) and not _is_deformable(_parent(model, path))
    ]
    return next((path for path in reversed(paths) if _side(model, path) == side), None)


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])
