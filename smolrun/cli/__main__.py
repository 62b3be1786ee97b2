"""`python -m smolrun.cli`, for where scripts are not on the PATH."""

import sys

from smolrun.cli import main

sys.exit(main())
