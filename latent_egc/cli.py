"""The command line under its former name."""

from latent_egc.commands import main, train_main

__all__ = ["main", "train_main"]
