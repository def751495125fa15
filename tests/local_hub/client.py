"""How the client in this process, and those in others, come to talk to the local Hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers.utils.hub
from huggingface_hub import constants

from .server import LocalHub


def environment(hub: LocalHub, work: Path, token: str | None) -> dict[str, str]:
    """Environment variables of a process that uses the local Hub, with caches of its own under `work`."""
    variables = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    variables |= {"HF_HOME": str(work / "home"), "HF_HUB_CACHE": str(work / "cache"), "HF_TOKEN": token or ""}
    variables |= {"HF_MODULES_CACHE": str(work / "modules")}
    variables.pop("HF_HUB_OFFLINE", None)
    return variables


@contextmanager
def connected(hub: LocalHub, work: Path, token: str | None) -> Iterator[pytest.MonkeyPatch]:
    """The client of this process uses the local Hub; it has read its environment already."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(hub, work, token).items():
            patch.setenv(name, value)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(work / "cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(work / "home" / "token"))
        patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        yield patch
