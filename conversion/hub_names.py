"""What may be a name on the Hub, and what can only be a path."""

import re
from pathlib import Path


HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def may_be_on_hub(name: str) -> bool:
    """
    Whether a name that is no path here may be one of the Hub: `OWNER/NAME`, where there is no folder `OWNER` either.
    Asking the Hub for a mistyped path takes a minute where there is no connection.
    """
    return HUB_NAME.fullmatch(name) is not None and not Path(name).parent.is_dir()
