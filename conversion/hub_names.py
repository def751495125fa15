"""What may be a name on the Hub, what can only be a path, and whether it is there."""

import re
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError


HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
OLD_NAME = re.compile(r"[\w-][\w.-]*")  # of the first models, such as gpt2


def may_be_on_hub(name: str) -> bool:
    """Whether a name that is no path here may be one of the Hub: `OWNER/NAME`, where there is no folder `OWNER`."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).parent.is_dir()


def check_exists(name: str, what: str, old: bool = False) -> None:
    """
    Answers at once for what is neither a path here nor on the Hub: loaders ask several times, for a minute in all.

    Args:
        name: path or Hub id.
        what: what it should be, for the message.
        old: whether it may be a name without owner.

    Raises:
        FileNotFoundError: if there is nothing of that name, or the Hub cannot be asked.
    """
    if Path(name).exists():
        return
    if not may_be_on_hub(name) and not (old and OLD_NAME.fullmatch(name)):
        raise FileNotFoundError(f"there is no {what} {name}.")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "adapter_config.json")):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no {what} {name}, neither a path here nor a repository of the Hub that you may see."
        ) from error
    except HfHubHTTPError:  # too many requests, terms to be accepted: whoever loads it says so
        return
    except Exception as error:  # the transport's own exceptions differ between versions of the client
        why = "is switched off by HF_HUB_OFFLINE" if isinstance(error, OfflineModeIsEnabled) else "cannot be reached"
        raise FileNotFoundError(f"there is no {what} {name} here, and the Hub {why}.") from error
