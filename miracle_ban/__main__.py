"""`python -m miracle_ban`: the command line."""

import sys

from .cli import main

sys.exit(main())
