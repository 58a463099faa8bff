"""Arguments that ``train`` and ``distill`` share, and the configuration they make."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attn_kd.cli._arguments import (
    add_data_argument,
    add_device_argument,
    add_output_argument,
    positive_float,
    positive_int,
    require_writable,
    resolve_device,
    whole_number,
)
from attn_kd.errors import InputError
from attn_kd.training.config import (
    MIXED_PRECISIONS,
    SCHEDULES,
    TrainingConfig,
    read_json,
    with_present_names,
)
from attn_kd.training.recipes import RECIPES
from attn_kd.training.records import RunFolder, RunRecord

if TYPE_CHECKING:
    from attn_kd.training import TrainingRun


class Option(NamedTuple):
    """An argument that sets a field of :class:`~attn_kd.training.TrainingConfig`."""

    flag: str
    field: str
    help: str
    type: Callable[[str], Any] | None = None  # None: a switch
    choices: tuple[str, ...] | None = None
    value: bool = True  # that a switch sets
    metavar: str | tuple[str, str] | None = None  # None: N, or X for a real number
    several: bool = False  # takes one or more values, and may be given several times


MODEL_OPTIONS = (
    Option("--encoder-layers", "encoder_layers", "encoder layers", positive_int),
    Option("--decoder-layers", "decoder_layers", "decoder layers", positive_int),
    Option("--num-queries", "num_queries", "object queries: most objects found", positive_int),
)
LENGTH_OPTIONS = (
    Option("--epochs", "epochs", "passes over the training split", positive_int),
    Option("--steps", "max_steps", "optimiser steps; overrides --epochs", positive_int),
    Option("--batch-size", "batch_size", "images a step", positive_int),
    Option("--no-augment", "augment", "train on the images as they are", value=False),
)
OPTIMISER_OPTIONS = (
    Option("--lr", "learning_rate", "learning rate", positive_float),
    Option("--backbone-lr", "backbone_learning_rate", "the backbone's, if another", positive_float),
    Option("--schedule", "schedule", "of the learning rate", str, SCHEDULES),
    Option("--amp", "amp", "mixed precision", str, MIXED_PRECISIONS),
)
BACKBONE_OPTIONS = (
    Option("--freeze-backbone", "freeze_backbone", "train the transformer alone"),
    Option("--cache-features", "cache_features", "compute a frozen backbone's features once"),
    Option("--cache-views", "cache_views", "views of an image in that cache", positive_int),
)
RUN_OPTIONS = (
    Option("--eval-steps", "eval_steps", "steps between COCO metrics on val", positive_int),
    Option("--save-steps", "save_steps", "steps between checkpoints", positive_int),
    Option("--log-steps", "log_steps", "steps between entries of history.json", positive_int),
    Option("--workers", "num_workers", "processes that load images", whole_number),
    Option("--tensorboard", "tensorboard", "write curves for TensorBoard to OUT/tensorboard"),
)


def add_training_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Everything but what the model is and what it learns from."""
    add_data_argument(parser)
    add_output_argument(parser, f"the {what}, its settings and its history")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON of settings, by the names in training.json; arguments override them",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="go on with an interrupted training in --out"
    )
    again.add_argument("--overwrite", action="store_true", help="replace a training in --out")
    parser.add_argument(
        "--feature-dir",
        type=Path,
        metavar="DIR",
        help="keep cached features there for further runs (default: in memory)",
    )
    add_device_argument(parser)
    add_options(parser, "length", LENGTH_OPTIONS)
    add_options(parser, "optimiser", OPTIMISER_OPTIONS)
    add_options(parser, "backbone", BACKBONE_OPTIONS)
    add_options(parser, "run", RUN_OPTIONS)


def add_options(parser: argparse.ArgumentParser, title: str, options: tuple[Option, ...]) -> None:
    """Add arguments whose absence leaves a field to what the recipe or the default says."""
    group = parser.add_argument_group(title)
    parser.set_defaults(
        flags={**(parser.get_default("flags") or {}), **{o.field: o.flag for o in options}}
    )
    for option in options:
        text = option.help if "default" in title else option.help + _default_of(option)
        how: dict[str, Any] = {"dest": option.field, "default": None, "help": text}
        if option.type is None:
            how |= {"action": "store_const", "const": option.value}
        elif option.choices is not None:
            how |= {"choices": option.choices, "metavar": option.metavar}
        else:
            number = "X" if "float" in str(option.type) else "N"
            how |= {"type": option.type, "metavar": option.metavar or number}
        if option.several:
            how |= {"nargs": "+", "action": "extend"}
        group.add_argument(option.flag, **how)


@functools.cache
def _recipes() -> dict[str, TrainingConfig]:
    return {name: TrainingConfig.for_preset(preset=name) for name in RECIPES}


def _default_of(option: Option) -> str:
    """What the recipes say of an option, for its help; nothing where the help says it itself."""
    values = {name: getattr(recipe, option.field) for name, recipe in _recipes().items()}
    told = [value for value in values.values() if value is not None and value is not False]
    if not told or option.type is None or "default" in option.help:
        return ""
    if all(value == told[0] for value in values.values()):
        return f" (default: {told[0]})"
    named = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
    return f" (default: {named})"


def configuration(args: argparse.Namespace, **known: Any) -> TrainingConfig:
    """The configuration of a command line.

    A field is what an argument says; else what ``--config`` says; else ``known``; else what the
    preset's recipe says. A training that is resumed has the settings it was begun with.

    Raises:
        InputError: a value is refused, or a file that is read, or an argument would change a
            training that is resumed.
    """
    begun = RunFolder(args.out).begun().config if args.resume else None
    base = known if begun is None else begun.to_dict()
    from_file = {} if args.config is None else _settings(args.config)
    fields = vars(TrainingConfig()).keys()
    given = {n: v for n, v in vars(args).items() if n in fields and v is not None}
    if not args.seed_is_given:
        del given["seed"]
    config = TrainingConfig.for_preset(**{**base, **from_file, **given})
    for name, (now, before) in {} if begun is None else config.differences(begun).items():
        if name in given:  # what a file changes is refused later, by the name in the file
            argument = args.flags.get(name, f"--{name}")
            change = f"{argument} is {now!r}, it was {before!r}"
            if isinstance(now, bool):  # a switch, which changes something where it was not given
                change = f"it was begun without {argument}"
            raise InputError(f"cannot resume {args.out}: {change}")
    return config


def _settings(path: Path) -> dict[str, Any]:
    """The settings in a file: alone, or in the record of a run (its ``training.json``)."""
    values = read_json(path, dict)
    if "config" in values:
        return RunRecord.load(path).config.to_dict()
    return with_present_names(values)


def run_options(args: argparse.Namespace, title: str) -> dict[str, Any]:
    """How the training is run: the fields of :class:`~attn_kd.training.RunOptions`."""
    if not args.resume:
        require_writable(args.out)
    return {
        "resume": args.resume,
        "overwrite": args.overwrite,
        "device": None if args.device is None else resolve_device(args.device),
        "feature_folder": args.feature_dir,
        "progress": not args.quiet,
        "title": title,
    }


def finish(train: Callable[[], TrainingRun]) -> int:
    """Run a training to its end and say how it went."""
    run = train()
    last = next((entry for entry in reversed(run.history) if "loss" in entry), None)
    losses = "" if last is None else f", loss {last['loss']:.4g}"
    if last is not None and "attention_kl" in last:
        losses += f", attention KL {last['attention_kl']:.4g}"
    steps = "" if last is None else f"{last['step']} step{'s' * (last['step'] != 1)} in "
    print(f"{steps}{run.seconds:.0f} s{losses}; wrote {run.folder}")
    return 0
