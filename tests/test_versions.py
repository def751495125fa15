"""The versions that the tests run on: those of the constraints files are those that pyproject.toml allows."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TESTED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["quant"]]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


@pytest.mark.parametrize("line", TESTED)
def test_the_floor_is_the_lower_bound(line: str):
    requirement = Requirement(line)
    (lowest,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
    pinned = pins("constraints-floor.txt")[requirement.name]
    # torch 2.11 runs where a GPU has it; on a CPU one build serves both environments.
    assert requirement.specifier.contains(pinned) if requirement.name == "torch" else pinned_as(lowest, pinned)


def pinned_as(lowest: str, pinned: str) -> bool:
    return [int(part) for part in pinned.split(".")][: lowest.count(".") + 1] == [int(p) for p in lowest.split(".")]


@pytest.mark.parametrize("line", TESTED)
def test_what_make_test_installs_is_allowed(line: str):
    requirement = Requirement(line)
    assert requirement.specifier.contains(pins("constraints.txt")[requirement.name])
