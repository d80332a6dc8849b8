"""Run the command line with `python -m rocr`."""

import sys

from rocr.cli import main

sys.exit(main())
