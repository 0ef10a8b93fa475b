"""Trains an energy network: accelerate launch train.py CONFIG [key.sub=value ...] [--dry-run]."""

import sys

from latent_egc.commands import train_main

if __name__ == "__main__":
    sys.exit(train_main())
