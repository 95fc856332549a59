"""Imports what the pieces need; the fork server does it once for all of them."""

import generate.sampler  # noqa: F401
import label.metrics  # noqa: F401
import label.scoring.shard_scorer  # noqa: F401
import train.execute  # noqa: F401
from train.distributed.library import library

library()
