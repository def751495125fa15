"""`python -m modeling_armt.conversion` is the `armt` command."""

import sys

from .cli import main


sys.exit(main())
