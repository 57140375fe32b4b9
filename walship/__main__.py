"""`python -m walship` is the `walship` command."""

import sys

from walship.cli import main

sys.exit(main())
