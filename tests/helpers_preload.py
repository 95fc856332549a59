"""What the fork server imports once, so that ranks and programs of tests start at once."""

import atexit
import gc
import logging
import os
from importlib import import_module

import torch
from jaxtyping import install_import_hook

SETTINGS = (
    "run=warm", "runs=/a b", "pairs=pickapic", "pairs.root=/x", "zero=stage2", "train.lr=1e-3",
    "train.steps=6", "train.reference.every=3", "train.device=cpu", "train.flip=true",
    "panel.voters=[clip,hps]", "+evaluate.models.one=/x", "vote.weights={hps: 2.0}",
)  # fmt: skip
with install_import_hook("train", "beartype.beartype"):  # shapes are checked in the ranks, too
    import train.distributed.library
    import train.execute  # noqa: F401

for name in (
    "label.run", "label.metrics", "label.scoring.shard_scorer", "evaluate.run", "evaluate.steps",
    "generate.sampler", "benchmarks.worlds",
):  # fmt: skip
    import_module(name)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
torch.set_num_threads(1)
with train.distributed.library.quiet():
    train.distributed.library.library()
    import deepspeed.module_inject.auto_ep_layer  # noqa: F401
    import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: F401
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - imports a compiler, 4 s
    from torch.utils import tensorboard  # noqa: F401
import_module("tests.helpers_compose").begin()
import_module("conf.job").composed(SETTINGS)  # its plugins and caches
import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("clip")
atexit.register(os._exit, 0)  # of the server; a compiler's library prints at a usual exit
gc.collect()
gc.freeze()  # no collection of a fork walks through, and thereby copies, all that is imported
