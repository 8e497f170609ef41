"""`python -m fledge` is `fledge`."""

import sys

from fledge.cli import main

sys.exit(main())
