"""What Kong starts: the plugin server of metering-and-billing, see kong.conf.example."""

import sys

from kong_metering.cli import main

if __name__ == "__main__":
    sys.exit(main())
