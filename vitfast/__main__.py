"""``python -m vitfast`` is the command ``vitfast``."""

import sys

from vitfast.cli import main

sys.exit(main())
