"""Run the command line as ``python -m attn_kd``."""

import sys

from attn_kd.cli import main

sys.exit(main())
