"""The metadata of the distribution: what pip installs, and what the pinned versions promise."""

from __future__ import annotations

from importlib.metadata import entry_points, metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import attn_kd
from attn_kd import cli

ROOT = Path(attn_kd.__file__).parents[1]


def requirements() -> list[Requirement]:
    return [Requirement(line) for line in requires("attn_kd") or []]


def extras_of(requirement: Requirement) -> set[str]:
    extras = metadata("attn_kd").get_all("Provides-Extra") or []
    marker = requirement.marker
    return {
        extra
        for extra in extras
        if marker is not None
        and "extra" in str(marker)
        and marker.evaluate({"extra": extra, "sys_platform": "linux"})
    }


def test_version_is_the_one_of_the_package():
    assert metadata("attn_kd")["Version"] == attn_kd.__version__


def test_license_is_apache_with_its_text():
    assert metadata("attn_kd")["License-Expression"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_needs_torch_and_numpy_alone():
    plain = {requirement.name for requirement in requirements() if not extras_of(requirement)}
    assert plain == {"torch", "numpy"}


def test_optional_packages_come_with_their_extra():
    extra_of = {requirement.name: extras_of(requirement) for requirement in requirements()}
    assert extra_of["triton"] == {"gpu"}
    assert extra_of["transformers"] == {"detr"}
    assert extra_of["matplotlib"] == {"report"}
    assert extra_of["attn_kd"] == {"all"}


def test_console_script_is_the_command_line():
    (script,) = entry_points(group="console_scripts", name="attn-kd")
    assert script.load() is cli.main


@pytest.fixture(scope="module")
def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pinned}


def test_every_requirement_of_development_is_pinned(pins):
    unpinned = {
        requirement.name
        for requirement in requirements()
        if extras_of(requirement) <= {"gpu", "detr", "report", "video", "dev"}
        and canonicalize_name(requirement.name) not in pins
    }
    assert not unpinned


def test_pins_are_exact_and_within_what_the_metadata_allows(pins):
    for pin in pins.values():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
    for requirement in requirements():
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is not None:
            (specifier,) = pin.specifier
            assert requirement.specifier.contains(specifier.version), (requirement, pin)
