"""Under what circumstances a number was measured."""

import datetime
import platform
import shlex
import sys
from types import ModuleType
from typing import Any

import torch


def circumstances(*modules: ModuleType, device: str | None = None, command: str | None = None) -> dict[str, Any]:
    """
    The `command`, `date`, `device` and `versions` of a measurement.

    Args:
        modules: whose versions count, beside Python's.
        device: it ran on; default: the GPU if there is one.
        command: default: that of this process.
    """
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return {
        "command": command or shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "versions": {"python": platform.python_version()} | {m.__name__: str(m.__version__) for m in modules},
    }
