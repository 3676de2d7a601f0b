"""`python -m vlprune_edge`."""

import sys

from vlprune_edge.command import main


sys.exit(main())
