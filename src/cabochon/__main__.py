"""`python -m cabochon` is the `cabochon` command."""

import sys

from cabochon.cli.main import main

sys.exit(main())
