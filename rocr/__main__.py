"""`python -m rocr` is the command line."""

import sys

from rocr.cli import main

sys.exit(main())
