"""Under what circumstances a number was measured."""

import datetime
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def versions(*packages: str) -> dict[str, str | None]:
    """
    Versions by package, None for what is not installed. They are what pip calls them: PyPI's torch is `2.13.0` there,
    and `2.13.0+cu130` in its `__version__`.
    """
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def circumstances(*packages: str, device: str | None = None, command: str | None = None) -> dict[str, Any]:
    """
    The `command`, `date`, `device` and `versions` of a measurement.

    Args:
        packages: whose versions count, beside Python's.
        device: it ran on; default: the GPU if there is one.
        command: default: that of this process.
    """
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return {
        "command": command or shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "versions": {"python": platform.python_version()} | versions(*packages),
    }
