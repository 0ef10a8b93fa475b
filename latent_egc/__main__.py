"""python -m latent_egc VERB, or accelerate launch -m latent_egc VERB: the command line."""

import sys

from latent_egc.commands import main

sys.exit(main())
