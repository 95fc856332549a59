"""Tiny scorers with random weights, and tiny pair sets with every kind of broken row."""

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from data.artifacts.atomic import sha256_of
from data.miniature import scenes, tokenizer
from label.config import MetricSpec

SIDE = 32
DIM = 24
VOTERS = ("clip", "pickscore", "hps", "aesthetic")


def clip_config(seed_free_act: str = "gelu") -> CLIPConfig:
    vocabulary = tokenizer.vocabulary()
    end, begin = vocabulary[tokenizer.END], vocabulary[tokenizer.BEGIN]
    tower = {
        "hidden_size": 32,
        "intermediate_size": 128,  # open_clip's towers are four times as wide inside
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": seed_free_act,
    }
    return CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": tokenizer.CONTEXT,
            "eos_token_id": end,
            "bos_token_id": begin,
            "pad_token_id": end,
        },
        vision_config={**tower, "image_size": SIDE, "patch_size": 8},
        projection_dim=DIM,
    )


def open_clip_config() -> dict:
    return {
        "embed_dim": DIM,
        "vision_cfg": {
            "image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8
        },
        "text_cfg": {
            "context_length": tokenizer.CONTEXT,
            "vocab_size": len(tokenizer.vocabulary()),
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }  # fmt: skip


def random_open_clip(seed: int) -> CLIP:
    torch.manual_seed(seed)
    model = CLIP(**open_clip_config()).eval()
    for parameter in model.parameters():  # so that no two embeddings are nearly equal
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(model.logit_scale, 3.0)
    return model


def save_hf(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = CLIPModel(clip_config())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(model.logit_scale, 3.0)
    model.save_pretrained(folder)
    tokenizer.hf_tokenizer().save_pretrained(folder)


def save_open_clip(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": open_clip_config(), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    tokenizer.write_open_clip_merges(folder / "merges.txt.gz")
    state = {k: v.contiguous() for k, v in random_open_clip(seed).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def head_state(seed: int, dim: int = DIM) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    sizes = [dim, 16, 12, 8, 4, 1]
    state = {}
    for i, before, after in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        state[f"layers.{i}.weight"] = torch.randn(after, before) / before**0.5
        state[f"layers.{i}.bias"] = torch.randn(after)
    return state


def build_weights(root: Path) -> Path:
    save_hf(root / "clip", seed=1)
    save_hf(root / "pickscore", seed=2)
    save_open_clip(root / "hps", seed=3)
    save_file(head_state(4), root / "aesthetic.safetensors")
    return root


def specs(root: Path) -> dict[str, MetricSpec]:
    return {
        "clip": MetricSpec(kind="clip", weights=str(root / "clip")),
        "pickscore": MetricSpec(kind="pickscore", weights=str(root / "pickscore")),
        "hps": MetricSpec(kind="hps", weights=str(root / "hps")),
        "aesthetic": MetricSpec(
            kind="aesthetic",
            weights=str(root / "clip"),
            head=str(root / "aesthetic.safetensors"),
        ),
        "oracle": MetricSpec(kind="oracle"),
    }


# --- images and pairs --------------------------------------------------------------------------


def image(seed: int, size: tuple[int, int] = (40, 32), kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(coarse).resize(size).save(buffer, format=kind)
    return buffer.getvalue()


@dataclass
class Row:
    """A pair as Pick-a-Pic stores it."""

    prompt: str | None
    left: bytes | None
    right: bytes | None
    label_0: float = 1.0
    has_label: bool = True


def write_pairs(path: Path, rows: list[Row], drop: tuple[str, ...] = ()) -> None:
    table = pa.table(
        {
            "caption": pa.array([row.prompt for row in rows], pa.string()),
            "image_0_uid": [f"{path.stem}-{i}-a" for i in range(len(rows))],
            "image_1_uid": [f"{path.stem}-{i}-b" for i in range(len(rows))],
            "jpg_0": pa.array([row.left for row in rows], pa.binary()),
            "jpg_1": pa.array([row.right for row in rows], pa.binary()),
            "label_0": [row.label_0 for row in rows],
            "label_1": [1 - row.label_0 for row in rows],
            "has_label": [row.has_label for row in rows],
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.drop_columns(list(drop)), path, row_group_size=8)


def good_rows(count: int, first: int = 0) -> list[Row]:
    """Distinct pairs; every image occurs in two of them, as in the real set."""
    prompts = scenes.prompts("train")
    return [
        Row(prompts[(first + i) // 2], image(first + i), image(first + i + 1), float(i % 3 != 0))
        for i in range(count)
    ]


def broken_rows() -> list[Row]:
    """One row for each way in which a pair can be bad."""
    good, prompt = image(900), scenes.prompts("train")[0]
    return [
        Row(prompt, image(901)[: len(image(901)) // 2], good),
        Row(prompt, good, b""),
        Row(prompt, b"<html><body>AccessDenied</body></html>", good),
        Row(prompt, None, good),
        Row("   ", good, image(902)),
        Row(None, good, image(903)),
    ]


def build_pairs(root: Path, num_files: int = 3, per_file: int = 12) -> Path:
    for number in range(num_files):
        rows = good_rows(per_file, first=100 * number)
        if number == 1:
            rows += [*broken_rows(), rows[0], Row(rows[0].prompt, rows[0].left, rows[0].left, 0.5)]
        write_pairs(root / f"train-{number:05d}-of-{num_files:05d}.parquet", rows)
    return root


# --- the program ---------------------------------------------------------------------------------


def overrides(weights: Path, pairs: Path, runs: Path) -> list[str]:
    """Command-line settings that run stage one on tiny scorers and pairs."""
    return [
        f"runs={runs}", "run=tiny", "pairs=pickapic", f"pairs.root={pairs}",
        "label.workers=0", "label.device=cpu", "label.batch=8",
        f"metrics.clip.weights={weights}/clip",
        f"metrics.pickscore.weights={weights}/pickscore",
        f"metrics.hps.weights={weights}/hps",
        f"metrics.aesthetic.weights={weights}/clip",
        f"metrics.aesthetic.head={weights}/aesthetic.safetensors",
    ]  # fmt: skip


PRELOAD = [
    "conf.job", "label.run", "label.scoring.shard_scorer", "label.analysis.report",
    "open_clip.model",
    "open_clip.tokenizer", "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
]  # fmt: skip
"""What is imported once, so that a run of the program takes a second and not twenty."""

PATIENCE_S = 300.0
"""Tests share their cores; what takes a second may take a minute."""


class Program:
    """A running `python -m label`."""

    def __init__(self, pid: int, out: Path) -> None:
        self.pid, self._out = pid, out

    def wait(self, seconds: float = PATIENCE_S) -> int | None:
        """The exit status (negative: the signal), or None when it is still running."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (path := status_path(self._out)).exists():
                return int(path.read_text())
            time.sleep(0.005)
        return None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(self.pid, signal.SIGKILL)


class Nursery:
    """A process that has imported everything and computed nothing, and forks into programs.

    Not multiprocessing's fork server: there is one of those, with one list of imports, for all
    tests together.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.helpers_label import serve; serve()"],
            cwd=Path(__file__).parent.parent, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )  # fmt: skip

    def start(
        self, arguments: list[str], out: Path, largest_file: int = 0, **environment: str
    ) -> Program:
        """Start the program in a process group of its own; all it says goes to `out`.

        It can write no file of more than `largest_file` bytes: as good as a full disk.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        status_path(out).unlink(missing_ok=True)
        request = {
            "arguments": arguments, "out": str(out), "environment": environment,
            "largest_file": largest_file,
        }  # fmt: skip
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Program(int(self._process.stdout.readline()), out)

    def run(self, arguments: list[str], out: Path, **environment: str) -> tuple[int | None, str]:
        """Run the program to its end; exit status, and all it said."""
        status = self.start(arguments, out, **environment).wait()
        return status, out.read_text()

    def close(self) -> None:
        """End the process; it leaves at the end of its input."""
        self._process.communicate(timeout=PATIENCE_S)


@cache
def nursery() -> Nursery:
    """The one nursery of this test session."""
    built = Nursery()
    atexit.register(built.close)
    return built


def members(group: int) -> dict[int, str]:
    """The living processes of a process group, with their command lines."""
    results = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            command = path.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            results[int(path.parent.name)] = command
    return results


def status_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.status")


def serve() -> None:
    """The nursery's side: fork for each line of input, and note how each program ended."""
    for name in PRELOAD:
        importlib.import_module(name)
    importlib.import_module("tests.helpers_compose").begin()
    settings = overrides(Path("/a"), Path("/b c"), Path("/d"))
    importlib.import_module("conf.job").composed(settings)  # its plugins and caches
    gc.collect()
    gc.freeze()  # no collection of a fork walks through, and thereby copies, what is imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        if os.fork():
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if not child:
            os._exit(program(**request))
        print(child, flush=True)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        path = status_path(Path(request["out"]))
        path.with_suffix(".new").write_text(str(ended))
        path.with_suffix(".new").rename(path)
        os._exit(0)


def program(arguments: list[str], out: str, environment: dict[str, str], largest_file: int) -> int:
    """`python -m label` in this process."""
    from conf.job import entry
    from label.run import main

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    os.environ |= environment
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["label", *arguments]
    try:
        entry(main)()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every Parquet file below a folder."""
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*.parquet"))
    }
