"""Imports what the pieces need; the fork server does it once for all of them."""

from importlib import import_module

import generate.sampler  # noqa: F401
import label.metrics  # noqa: F401
import label.scoring.shard_scorer  # noqa: F401
import train.execute  # noqa: F401
from train.distributed.library import library

library()
for name in ("deepspeed.runtime.zero.muon.original_muon", "torch.utils.tensorboard"):
    import_module(name)  # 3 s that the first engine and the metrics log would take
