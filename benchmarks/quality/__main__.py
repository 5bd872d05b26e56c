"""`python -m benchmarks.quality` is `python -m benchmarks.quality.run`."""

import sys

from benchmarks.quality.run import main

sys.exit(main())
