"""Stage one where things go wrong: killed, interrupted, damaged or hostile inputs, a full disk.

Whatever happens, nothing that was finished is lost, and the same command ends with the same files.
"""

import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from label.metrics.preprocessing import ImageTransform, ResizeMode
from label.scoring.decode_pool import DecodePool
from tests import helpers_label as tiny
from tests.helpers_ranks import context

NUM_KILLS = 20


@pytest.fixture(scope="module")
def nursery() -> tiny.Nursery:
    return tiny.nursery()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scorers and pairs, the first file of which is the smallest."""
    root = tmp_path_factory.mktemp("world")
    tiny.build_weights(root / "weights")
    tiny.build_pairs(root / "pairs")
    return root


@pytest.fixture(scope="module")
def expected(nursery: tiny.Nursery, world: Path) -> dict[str, str]:
    """The hashes of an undisturbed run's files."""
    arguments = tiny.overrides(world / "weights", world / "pairs", world / "runs")
    status, said = nursery.run(arguments, world / "out.txt")
    assert status == 0, said
    return tiny.hashes(world / "runs" / "tiny")


@pytest.fixture
def place(world: Path, tmp_path: Path) -> "Place":
    return Place(tmp_path, tiny.overrides(world / "weights", world / "pairs", tmp_path / "runs"))


class Place:
    """A run's folder, and the command that fills it."""

    def __init__(self, root: Path, arguments: list[str]) -> None:
        self.root, self.arguments = root, arguments
        self.folder, self.out = root / "runs" / "tiny", root / "out.txt"

    def files(self) -> int:
        """How many files are whole."""
        names = (name for _, _, files in os.walk(self.folder) for name in files)
        return sum(not name.startswith(".") for name in names)

    def parts(self) -> dict[Path, int]:
        """The shards that are there, with the time of their writing."""
        return {path: path.stat().st_mtime_ns for path in self.folder.rglob("part-*")}

    def wait_for_parts(self, process: tiny.Program, count: int = 1) -> None:
        while len(self.parts()) < count:
            assert process.wait(0.01) is None, self.out.read_text()


def check_repeated(nursery: tiny.Nursery, place: Place, expected: dict[str, str]) -> None:
    """The same command ends well, leaves finished shards as they are, and its files are those."""
    before = place.parts()
    status, said = nursery.run(place.arguments, place.out)
    assert status == 0, said
    assert tiny.hashes(place.folder) == expected
    assert not list(place.folder.rglob(".*"))  # nor is anything half written left
    after = place.parts()
    assert {path: after[path] for path in before if "scores" in path.parts} == {
        path: written for path, written in before.items() if "scores" in path.parts
    }


# --- killed and interrupted ----------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_twenty_moments_and_repeated(
    nursery: tiny.Nursery, place: Place, expected: dict[str, str]
) -> None:
    """Each time after some more files than before, at any point of the work on the next one."""
    chance, kills = random.Random(5), 0
    whole = len(expected) + 7  # a manifest for each of six sets, and the weights' hashes
    while kills < NUM_KILLS:
        more, delay_s = chance.choice((0, 0, 1, 1, 2)), chance.uniform(0, 0.05)
        start = place.files()
        process = nursery.start(place.arguments, place.out)
        while process.wait(0.002) is None and place.files() < start + more:
            pass
        if process.wait(delay_s) is None:
            process.kill()
        ended = process.wait()
        kills += ended == -signal.SIGKILL
        if ended == 0:
            assert place.files() == whole
            assert tiny.hashes(place.folder) == expected
            shutil.rmtree(place.folder)
    check_repeated(nursery, place, expected)


@pytest.mark.slow
def test_an_interrupted_run_ends_cleanly(
    nursery: tiny.Nursery, place: Place, expected: dict[str, str]
) -> None:
    process = nursery.start([*place.arguments, "label.workers=2"], place.out)
    place.wait_for_parts(process)
    os.killpg(process.pid, signal.SIGINT)
    status, said = process.wait(), place.out.read_text()
    assert not tiny.members(process.pid)
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert (status, last) == (130, "interrupted; rerun the same command, it resumes")
    check_repeated(nursery, place, expected)


def test_an_error_in_a_decoder_is_raised_where_its_result_is_read() -> None:
    before = threading.active_count()
    with DecodePool(2) as decoder:
        good = decoder.submit([(tiny.image(1), [ImageTransform(ResizeMode.CROP, 8)])])
        bad = decoder.submit([(tiny.image(1), [ImageTransform(ResizeMode.CROP, -8)])])
        assert good.wait()[0].arrays[ImageTransform(ResizeMode.CROP, 8)].shape == (8, 8, 3)
        with pytest.raises(ValueError, match="height and width must be > 0"):
            bad.wait()
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_want_of_memory_says_what_to_do(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("label.scoring.decode_pool.process_images", hungry)
    with DecodePool(workers) as decoder, pytest.raises(ValueError, match=r"lower label\.workers"):
        decoder.submit([]).wait()


def test_threads_and_processes_give_every_image_the_same_arrays_or_reason() -> None:
    """Damaged, huge and good images, decoded by four threads or two processes, as by one.

    The processes get more chunks than fit their memory at once, so some arrays come by the pipe.
    """
    contents = [content for content, _ in IMAGES.values()] * 20
    chunks = [[(content, [ImageTransform(ResizeMode.PAD, 16)])] for content in contents]
    outcomes = []
    context()  # the processes' server is that of the other tests
    for workers, most_threads in ((0, 0), (4, 4), (2, 0)):
        with DecodePool(workers, most_threads) as decoder:
            results = [decoder.submit(chunk) for chunk in chunks]
            if decoder._processes:
                assert decoder._processes._shared.take() is None
            images = [image for decoding in results for image in decoding.wait()]
            outcomes.append(
                [(i.status, i.reason, *(a.tobytes() for a in i.arrays.values())) for i in images]
            )
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert len(set(outcomes[0])) >= 5
    assert {len(outcome) for outcome in outcomes[0]} == {2, 3}


def test_a_killed_decoder_says_what_to_do() -> None:
    context()
    with DecodePool(1, most_threads=0) as decoder:
        decoder.submit([]).wait()
        (worker,) = decoder._processes.executor._processes
        os.kill(worker, signal.SIGKILL)
        results = (decoder.submit([]).wait() for _ in range(10_000))  # noticed when its pipe breaks
        with pytest.raises(ValueError, match=r"was killed or .* lower label\.workers"):
            list(results)


def test_a_decoder_that_cannot_start_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another one was killed at this moment, which closes the pool's pipes."""

    def fail() -> None:
        raise OSError("handle is closed")

    with DecodePool(1, most_threads=0) as decoder:
        monkeypatch.setattr(decoder._processes.executor, "_spawn_process", fail)
        with pytest.raises(ValueError, match=r"could not start, .* lower label\.workers"):
            decoder.submit([])


USE = """
import time
from label.scoring.decode_pool import DecodePool
if __name__ == "__main__":
    pool = DecodePool(1, most_threads=0)
    pool.submit([]).wait()
    print(*pool._processes.executor._processes, flush=True)
    time.sleep(60)
"""


def test_a_decoder_ends_with_its_run_alone_even_if_that_is_killed(tmp_path: Path) -> None:
    """An interrupt would end it in the middle of its imports, with a traceback; it is blocked."""
    (tmp_path / "use.py").write_text(USE)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, str(tmp_path / "use.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        worker = Path("/proc", process.stdout.readline().strip())
        status = (worker / "status").read_text()
        blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
        assert blocked >> signal.SIGINT - 1 & 1
        process.kill()
    for _ in range(100):
        if not worker.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{worker} is still there")


# --- a full disk ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("full_at", ["the first file", "the second shard", "the labels"])
def test_a_full_disk_loses_nothing(
    full_at: str, nursery: tiny.Nursery, place: Place, world: Path, expected: dict[str, str]
) -> None:
    def size(name: str) -> int:
        return (world / "runs" / "tiny" / name).stat().st_size

    largest = {
        "the first file": 1000,
        "the second shard": size("scores/pairs/part-00000.parquet") + 10,
        "the labels": size("scores/pairs/part-00001.parquet") + 10,
    }[full_at]
    assert largest < size("labels/majority/part-00001.parquet")
    process = nursery.start(place.arguments, place.out, largest_file=largest)
    status, said = process.wait(), place.out.read_text()
    assert status == 2, said
    assert "cannot be written" in said
    assert "free some space or choose another place (runs=...)" in " ".join(said.split())
    assert "Traceback" not in said
    done = {"the first file": 0, "the second shard": 5, "the labels": 15}[full_at]
    assert sum("scores" in path.parts for path in place.parts()) == done
    assert not list(place.folder.rglob("*/.*"))
    check_repeated(nursery, place, expected)


# --- damaged and hostile inputs ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_page_of_a_pair_file_is_named(
    checksums: bool, nursery: tiny.Nursery, place: Place, world: Path
) -> None:
    pairs = Path(shutil.copytree(world / "pairs", place.root / "pairs"))
    last = sorted(pairs.iterdir())[-1]
    pq.write_table(pq.read_table(last), last, row_group_size=8, write_page_checksum=checksums,
                   use_dictionary=False)  # fmt: skip
    sound = last.read_bytes()
    place.arguments = [a for a in place.arguments if "pairs.root" not in a]
    place.arguments.append(f"pairs.root={pairs}")
    column = pq.read_metadata(last).row_group(1).column(3)
    # The end of the data, or what stands before it and says what it is.
    at = column.data_page_offset + (column.total_compressed_size - 9 if checksums else 2)
    last.write_bytes(sound[:at] + bytes([sound[at] ^ 255]) + sound[at + 1 :])
    status, said = nursery.run(place.arguments, place.out)
    assert status == 2, said
    message = " ".join(said.split())
    assert f"{last} row 0, or one soon after it, cannot be read" in message
    assert (
        "fetch it again if it is damaged, then rerun the same command: what is finished is kept"
        in message
    )
    assert len(place.parts()) == 10
    last.write_bytes(sound)
    before = place.parts()
    assert nursery.run(place.arguments, place.out)[0] == 0
    assert before.items() <= place.parts().items()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 900 million pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + crc

    header = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    )


def animation(form: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (40, 32), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, format=form, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def long_image(width: int, height: int) -> bytes:
    return tiny.image(7, (width, height), "PNG")


GOOD = tiny.image(500)
IMAGES = {
    "half a JPEG": (tiny.image(1)[:300], "unreadable_image"),
    "a bomb": (bomb(), "too_large"),
    "no bytes": (b"", "unreadable_image"),
    "zeros": (b"\0" * 5000, "unreadable_image"),
    "a page": (b"<!doctype html><title>403 Forbidden</title>", "unreadable_image"),
    "GIF": (animation("GIF"), "ok"),
    "APNG": (animation("PNG"), "ok"),
    "WEBP": (animation("WEBP"), "ok"),
    "a dot": (long_image(1, 1), "ok"),
    "a line": (long_image(20_000, 1), "too_large"),
    "a column": (long_image(1, 20_000), "too_large"),
}
PROMPTS = {
    "empty": (b"", "empty_prompt"),
    "spaces": (b" \t\n", "empty_prompt"),
    "long": (b"a small red circle " * 527, "ok"),
    "one long word": (b"x" * 10_000, "ok"),
    "not UTF-8": (b"a caf\xe9 \xff\xfe", "ok"),
    "a surrogate": (b"a \xed\xa0\x80 cat", "ok"),
    "a NUL": (b"a \0 cat", "ok"),
    "only NUL": (b"\0", "ok"),
    "no letters": ("\u200b\u202e\U0001f600".encode(), "ok"),
}


@pytest.mark.slow
def test_every_hostile_row_gets_a_status(nursery: tiny.Nursery, place: Place) -> None:
    cases = {
        **{name: (b"a cat", content, status) for name, (content, status) in IMAGES.items()},
        **{name: (prompt, GOOD, status) for name, (prompt, status) in PROMPTS.items()},
        "plain": (b"a cat", GOOD, "ok"),
        "plain again": (b"a cat", GOOD, "ok"),
    }
    prompts, lefts, statuses = zip(*cases.values(), strict=True)
    table = pa.table(
        {
            "caption": pa.array(prompts, pa.binary()).view(pa.string()),
            **{f"image_{side}_uid": [f"{name}-{side}" for name in cases] for side in (0, 1)},
            "jpg_0": pa.array(lefts, pa.binary()),
            "jpg_1": [tiny.image(i) for i in range(len(cases))],
            "label_0": [1.0] * len(cases),
            "label_1": [0.0] * len(cases),
        }
    )
    twice = pa.concat_tables([table, table.slice(len(table) - 1)])
    (place.root / "pairs").mkdir()
    for number in range(2):  # every pair is in both files
        pq.write_table(twice, place.root / "pairs" / f"train-{number}.parquet")
    place.arguments.append(f"pairs.root={place.root}/pairs")
    status, said = nursery.run([*place.arguments, "label.workers=2"], place.out)
    assert status == 0, said
    labelled = pl.read_parquet(place.folder / "labels" / "majority" / "part-*.parquet")
    assert labelled.height == 2 * len(twice)
    assert labelled["pair_id"].n_unique() == labelled.height  # equal pairs are counted
    first = labelled.head(len(table))
    assert dict(zip(cases, first["status"], strict=True)) == dict(zip(cases, statuses, strict=True))
    assert (first.filter(pl.col("status") != "ok")["reason"].str.len_chars() > 0).all()
    assert first.filter(pl.col("status") == "ok")["reason"].to_list() == [""] * statuses.count("ok")
    scores = first.filter(pl.col("status") == "ok").select(pl.col("^score_.*$"))
    assert scores.select(pl.all().is_finite().all()).row(0) == (True,) * 8
    prompt_of = dict(zip(cases, first["prompt"], strict=True))
    assert prompt_of["not UTF-8"] == "a caf\ufffd \ufffd\ufffd"
    assert prompt_of["a NUL"] == "a \0 cat"
    assert prompt_of["long"] == "a small red circle " * 527
    counted = Counter(labelled["status"].to_list())
    line = next(line for line in said.splitlines() if line.startswith("scored "))
    assert line == (
        f"scored {counted['ok']} · unreadable image {counted['unreadable_image']} · "
        f"too large {counted['too_large']} · empty prompt {counted['empty_prompt']} · "
        f"total {labelled.height}"
    )
    before = tiny.hashes(place.folder)
    shutil.rmtree(place.folder)
    assert nursery.run(place.arguments, place.out)[0] == 0
    assert tiny.hashes(place.folder) == before  # reasons are the same each time


# --- checkpoints ---------------------------------------------------------------------------------


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("THIS CODE RAN",)


def damage(folder: Path, how: str) -> str:
    """Damage a CLIP checkpoint; what the message must have."""
    path = folder / "model.safetensors"
    state = load_file(path)
    if how == "missing":
        path.unlink()
        return "has none of model.safetensors"
    if how == "torn":
        path.write_bytes(path.read_bytes()[:5000])
        return "model.safetensors"
    path.unlink()
    if how == "of another shape":
        save_file(state | {"visual_projection.weight": torch.zeros(3, 3)}, path)
        return "visual_projection.weight"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    return "pytorch_model.bin"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["missing", "torn", "of another shape", "pickled"])
def test_checkpoints_that_cannot_be_used(
    how: str, nursery: tiny.Nursery, place: Place, world: Path, expected: dict[str, str]
) -> None:
    shutil.copytree(world / "runs" / "tiny", place.folder)
    shutil.rmtree(place.folder / "labels")
    shutil.rmtree(place.folder / "scores" / "clip")
    weights = Path(shutil.copytree(world / "weights" / "clip", place.root / "clip"))
    needed = damage(weights, how)
    command = [*place.arguments, f"metrics.clip.weights={weights}"]
    status, said = nursery.run(command, place.out)
    assert status == 2, said
    assert needed in said
    assert str(weights) in said
    assert "THIS CODE RAN" not in said
    assert "Traceback" not in said
    assert not (place.folder / "scores" / "clip").exists()
    check_repeated(nursery, place, expected)
