"""`python -m benchmarks.evaluation` is `longreach eval`."""

import sys

from benchmarks.evaluation.cli import main

sys.exit(main())
