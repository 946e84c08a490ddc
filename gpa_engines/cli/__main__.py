"""`python -m gpa_engines.cli` is `gpa-run`."""

import sys

from gpa_engines.cli.run import main

sys.exit(main())
