"""The command line under its former name."""

import sys

from latent_egc.commands import main, train_main

__all__ = ["main", "train_main"]

if __name__ == "__main__":
    sys.exit(main())
