"""Under what circumstances a number was measured."""

from importlib.metadata import version

import torch

from modeling_armt.conversion.circumstances import circumstances, versions


def test_versions_are_those_of_pip_whatever_the_build_is_called(monkeypatch):
    """PyPI's torch names itself after its build, `2.13.0+cu130`, and others in other ways."""
    monkeypatch.setattr(torch, "__version__", f"{version('torch')}+build")
    assert versions("torch", "no-such-package") == {"torch": version("torch"), "no-such-package": None}
    assert circumstances("torch")["versions"]["torch"] == version("torch")
