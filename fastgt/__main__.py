"""``python -m fastgt``."""

import sys

from fastgt.cli import main

sys.exit(main())
