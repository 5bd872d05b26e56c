"""`python -m benchmarks.loadtest` is `longreach loadtest`."""

import sys

from benchmarks.loadtest.cli import main

sys.exit(main())
