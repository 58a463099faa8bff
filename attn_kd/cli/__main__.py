"""Run the command line as ``python -m attn_kd.cli``."""

import sys

from attn_kd.cli import main

sys.exit(main())
