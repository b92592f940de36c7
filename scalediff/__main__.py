"""`python -m scalediff` and `torchrun -m scalediff`: the `scalediff` command."""

import sys

from scalediff.command.cli import main

sys.exit(main())
