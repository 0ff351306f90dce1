"""`python -m sirius_compile.cli`: the command line `sirius-compile`."""

import sys

from sirius_compile.cli.commands import main

sys.exit(main())
