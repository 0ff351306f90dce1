"""`python -m sirius_runtime.cli`: the command line `sirius`."""

import sys

from sirius_runtime.cli.commands import main

sys.exit(main())
