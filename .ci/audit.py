"""Audits the pinned dependencies without a network; prints what is wrong and exits with 1 if anything is.

Every package that `make` installs is pinned to one version, what is installed here is what is pinned, all of it came
from a package index, and no pinned version is one that `advisories.toml` names.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
INSTALLERS = {"pip", "setuptools", "wheel"}
"""Came with the interpreter."""

INSTALLED_EXTRAS = ("test", "lint", "docs")
"""Extras that `make` installs."""


def read_pins(lines: Iterable[str]) -> tuple[dict[str, Version], list[str]]:
    """Return the pinned versions by package, and what is wrong with the other lines."""
    pins: dict[str, Version] = {}
    wrong = []
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            wrong.append(f"{line}: no requirement: {error}")
            continue
        exact = re.fullmatch(r"==([^*]+)", str(requirement.specifier))
        if exact is None or requirement.url:
            wrong.append(f"{line}: not pinned to one version; write {requirement.name}==VERSION")
            continue
        name = canonicalize_name(requirement.name)
        if name in pins:
            wrong.append(f"{line}: {name} is pinned twice")
        pins[name] = Version(exact[1])
    return pins, wrong


def check_advisories(pins: Mapping[str, Version], advisories: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the pinned versions that have a known vulnerability."""
    return [
        f"{found['package']}=={pins[name]}: {found['id']}, {found['about']}; pin {found['fixed_in']} or newer"
        for found in advisories
        if (name := canonicalize_name(found["package"])) in pins and pins[name] < Version(found["fixed_in"])
    ]


def check_declared(project: Mapping[str, object], pins: Mapping[str, Version]) -> list[str]:
    """Return the declared dependencies that no pin satisfies."""
    declared: list[str] = list(project["dependencies"])  # type: ignore[call-overload]
    for extra in INSTALLED_EXTRAS:
        declared += project["optional-dependencies"][extra]  # type: ignore[index]
    wrong = []
    for requirement in map(Requirement, declared):
        pinned = pins.get(canonicalize_name(requirement.name))
        if pinned is None:
            wrong.append(f"{requirement}: has no pin in constraints.txt")
        elif pinned not in requirement.specifier:
            wrong.append(f"{requirement}: constraints.txt pins {pinned}")
    return wrong


def check_installed(installed: Iterable[Distribution], pins: Mapping[str, Version], *, own: str) -> list[str]:
    """Return what is installed in another version than the pinned one, or from elsewhere than an index."""
    wrong = []
    for found in installed:
        name = canonicalize_name(found.metadata["Name"])
        if name == own or name in INSTALLERS:
            continue
        if name not in pins:
            wrong.append(f"{name} {found.version} is installed and has no pin in constraints.txt")
        elif Version(found.version).public != pins[name].public:
            wrong.append(f"{name} {found.version} is installed, constraints.txt pins {pins[name]}")
        if found.read_text("direct_url.json") is not None:
            wrong.append(f"{name} {found.version} was installed from a path or an address, not from an index")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Audit, print and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--advisories", type=Path, default=ROOT / ".ci" / "advisories.toml")
    parser.add_argument("--skip-installed", action="store_true", help="audit the files alone")
    options = parser.parse_args(arguments)
    pins, wrong = read_pins(options.constraints.read_text(encoding="utf-8").splitlines())
    advisories = tomllib.loads(options.advisories.read_text(encoding="utf-8"))["advisory"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wrong += check_advisories(pins, advisories) + check_declared(project, pins)
    if not options.skip_installed:
        wrong += check_installed(distributions(), pins, own=project["name"])
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(pins)} pinned packages, {len(advisories)} advisories: {len(wrong)} findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
