"""Pair sets in object stores: the real clients of S3 and the hub against a local server."""

import io
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from conf.job import LEAVE_TO_FIRST_S, entry
from data.pairs import open_pairs
from data.pairs.config import Images, PairsSpec
from data.pairs.schema import PairsError
from data.storage import open_store
from data.storage.base import Store, StoreError, UnreachableError
from data.storage.remote import ClientHandler, no_way_to
from tests.helpers_pairs import (
    KINDS,
    hpdv2_train,
    make_set,
    pickapic,
    rows_of,
    spec_of,
    write_images,
    write_tar,
)
from tests.helpers_stores import COMMIT, Shop, served_folder
from tests.helpers_train import image

served = pytest.fixture(served_folder)


@pytest.fixture(autouse=True)
def own_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each reader of the memory store its own position in a file, as every other store does.

    fsspec hands all of them the same file, in which threads that read at once move each other.
    """
    shared = MemoryFileSystem._open

    def opened(
        store: MemoryFileSystem, path: str, mode: str = "rb", *args: Any, **more: Any
    ) -> Any:
        file = shared(store, path, mode, *args, **more)
        return io.BytesIO(file.getvalue()) if mode == "rb" else file

    monkeypatch.setattr(MemoryFileSystem, "_open", opened)


def store_of(client: object) -> Store:
    """A store whose files an fsspec client has."""
    return Store("x://set", fs.PyFileSystem(ClientHandler(client)), "set", remote=True)


def urls(served: Shop) -> list[str]:
    """The same folder by each way to it; memory has a copy."""
    memory = fsspec.filesystem("memory")
    for name, content in served.files().items():
        memory.pipe(f"/{served.folder.parent.name}/{name}", content)
    return [
        f"file://{served.folder}/set",
        f"memory://{served.folder.parent.name}/set",
        served.s3("set"),
        served.hub("set"),
    ]


# --- the same rows from everywhere ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_rows_from_every_store(kind: str, served: Shop):
    spec = make_set(kind, served.folder / "set")
    local = open_pairs(spec)
    rows = rows_of(local)
    assert sum(bool(row["image_0"]) for row in rows) >= 3
    for url in urls(served):
        source = open_pairs(replace(spec, root=url))
        assert rows_of(source) == rows, url
        assert source.shards == local.shards  # so labels of one place are labels of the other
        assert [source.row_groups(shard) for shard in source.shards] == [
            local.row_groups(shard) for shard in local.shards
        ]
        assert url.partition("?")[0].removeprefix("file://") == source.root


def test_images_in_another_store(served: Shop, tmp_path: Path):
    spec = hpdv2_train(tmp_path / "lists")
    write_images(served.folder / "set" / "train", ["a.jpg", "b.jpg", "c.jpg"])
    for url in urls(served):
        rows = rows_of(open_pairs(replace(spec, image_root=url)))
        assert [row["image_1"] for row in rows[:3]] == [image(1), image(2), None]


def test_paths_may_be_urls_below_the_root(served: Shop):
    write_images(served.folder / "set", ["0.png"])
    url = served.s3("set").partition("?")[0]
    row = {"text": "a", "left": f"{url}/0.png", "right": f"{url}/../0.png"}
    (served.folder / "set" / "x.jsonl").write_text(json.dumps(row))
    spec = spec_of(served.folder / "set", "jsonl", Images.paths, human="")
    (row,) = rows_of(open_pairs(replace(spec, root=served.s3("set"))))
    assert (row["image_0"], row["image_1"]) == (image(0), None)


def test_contents_are_named_without_being_fetched(served: Shop):
    make_set("pickapic", served.folder / "set")
    spec = PairsSpec(root=str(served.folder / "set"))
    known = [open_pairs(replace(spec, root=url)) for url in (spec.root, *urls(served))]
    served.requests.clear()
    local, _, memory, s3, hub = [source.fingerprint(source.shards[1]) for source in known]
    assert not [request for request in served.requests if request.startswith("GET")]
    assert hub == local
    assert len(local["sha256"]) == 64
    assert memory == {}
    assert len(s3["etag"]) == 32


def test_a_tar_in_a_store_is_searched_once(served: Shop, tmp_path: Path):
    spec = replace(make_set("hpdv2", served.folder / "set"), root=served.s3("set"))
    open_pairs(spec)
    (index,) = (tmp_path / "cache" / "balanceddpo").iterdir()
    assert sorted(served.files()) == ["set/train.json", "set/train.tar"]  # nothing is written there
    served.requests.clear()
    assert rows_of(open_pairs(spec))[0]["image_0"] == image(0)
    size = served.folder / "set" / "train.tar"
    whole = [r for r in served.requests if r.startswith("GET") and "train.tar" in r]
    assert len(whole) <= 12, (whole, size)  # its images, each read three times
    write_tar(size, {"train/a.jpg": image(7)})
    assert rows_of(open_pairs(spec))[0]["image_0"] == image(7)
    assert index.exists()


def test_only_the_wanted_row_group_is_fetched(served: Shop, monkeypatch: pytest.MonkeyPatch):
    """Reading one row group of many fetches little of the file."""
    monkeypatch.setattr("data.storage.base.BUFFER_BYTES", 1 << 16)
    table = pickapic(rows=8, jpg_0=[bytes([i]) * (1 << 20) for i in range(8)])
    path = served.folder / "set" / "train.parquet"
    pq.write_table(table, path, row_group_size=1, compression="none", use_dictionary=False)
    source = open_pairs(PairsSpec(root=served.s3("set")))
    served.bytes_sent = 0
    (pair,) = source.read_row_group(source.shards[0], 3).to_pylist()
    assert pair["image_0"] == bytes([3]) * (1 << 20)
    assert 1 << 20 < served.bytes_sent < 2 << 20 < path.stat().st_size


# --- a store that fails --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["s3", "hub"])
def test_clients_repeat_what_fails_in_passing(
    way: str, served: Shop, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    spec = make_set("pickapic", served.folder / "set")
    rows = rows_of(open_pairs(spec))
    source = open_pairs(replace(spec, root={"s3": served.s3, "hub": served.hub}[way]("set")))
    served.failures[:] = [500, 503]
    assert rows_of(source) == rows
    assert not served.failures


@pytest.mark.parametrize("kind", ["hpdv3", "jsonl", "pickapic"])
@pytest.mark.parametrize("way", ["s3", "hub"])
def test_half_an_answer_is_no_answer(
    way: str, kind: str, served: Shop, monkeypatch: pytest.MonkeyPatch
):
    """Either the client asks again, or the run ends; no row is made of it."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    spec = make_set(kind, served.folder / "set")
    rows = rows_of(open_pairs(spec))
    source = open_pairs(replace(spec, root={"s3": served.s3, "hub": served.hub}[way]("set")))
    served.failures[:] = ["cut"] * 2
    try:
        assert rows_of(source) == rows
    except ValueError as error:
        assert "rerun the same command" in str(error)  # noqa: PT017 - either is right
    assert len(served.failures) < 2


def test_a_client_that_gives_half_of_a_range_is_noticed():
    class Short:
        protocol = "x"

        def open(self, path: str, mode: str, **_: object) -> io.BytesIO:
            class Half(io.BytesIO):
                def read(self, size: int | None = -1) -> bytes:
                    return super().read(size)[:50]

            return Half(b"x" * 100)

    with pytest.raises(StoreError, match="x://set/file cannot be read: 50 of 100 bytes came"):
        store_of(Short()).read("file", 0, 1000)


def test_what_does_not_pass_ends_with_what_to_do():
    class Broken:
        protocol = "x"
        error: Exception = OSError("connection reset")

        def info(self, path: str) -> dict[str, object]:
            raise self.error

        def find(self, path: str, **_: object) -> dict[str, dict[str, object]]:
            raise self.error

        isdir = isfile = info

        def open(self, path: str, mode: str, **_: object) -> io.BytesIO:
            class Failing(io.BytesIO):
                def read(self, size: int | None = -1, error: Exception = self.error) -> bytes:
                    raise error

            return Failing(b"x" * 100)

    class NetworkError(Exception):
        """As httpx has them: no OSError."""

    client = Broken()
    store = store_of(client)
    for client.error in (OSError("connection reset"), PermissionError("reset by the admin"),
                         NetworkError("reset")):  # fmt: skip
        with pytest.raises(StoreError, match=r"x://set/a.png cannot be .*reset.*same command"):
            store.size("a.png")
        with pytest.raises(StoreError, match=r"x://set/a.png cannot be .*reset.*same command"):
            store.read("a.png", 0, 10)
        with pytest.raises(StoreError, match=r"x://set.* cannot be .*reset"):
            store.names("*.tar")
        with (
            pytest.raises(StoreError, match=r"x://set/a.jsonl cannot be .*reset"),
            store.open("a.jsonl") as file,
        ):
            list(file)
    client.error = FileNotFoundError("a.png")
    assert store.size("a.png") is None


@pytest.mark.parametrize("way", ["s3", "hub"])
def test_a_failing_store_is_no_missing_image(way: str, served: Shop):
    """A pair's status must not depend on the network of that day."""
    spec = make_set("hpdv3", served.folder / "set")
    url = {"s3": served.s3, "hub": served.hub}[way]("set")
    source = open_pairs(replace(spec, root=url))
    served.failures[:] = [403]
    with pytest.raises(StoreError, match=r"set/images/.\.jpg cannot be read.*(DENIED|403)"):
        list(source.read(source.shards[0]))
    if way == "s3":  # the hub's client keeps its list of files, which no commit changes
        (served.folder / "set" / "images" / "1.jpg").unlink()
        rows = rows_of(source)
        assert [None in (row["image_0"], row["image_1"]) for row in rows] == [True] * 5


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://datasets/owner/pairs/data", "40-digit commit, because a branch changes"),
        ("hf://datasets/owner/pairs@main/data", "40-digit commit"),
        ("hf://owner/pairs@" + COMMIT, "give hf://datasets/<owner>/<name>@<commit>/<folder>"),
        ("s3://key:secret@bucket/set", "credentials by the environment"),
        ("nosuch://bucket/set", "pairs.root=nosuch://bucket/set cannot be opened: .*nosuch"),
        ("abfs://container/set", "abfs://container/set cannot be opened: .*adlfs"),
        ("memory://nowhere", "there is no such folder"),
        ("file:///no/such", "pairs.root=file:///no/such is not a folder"),
        ("/no/such", "pairs.root=/no/such is not a folder; a hint"),
    ],
)
def test_urls_that_cannot_be_used(url: str, message: str):
    with pytest.raises(StoreError, match=message) as error:
        open_store("pairs.root", url, "a hint")
    assert "secret" not in str(error.value)


def test_folders_that_are_not_there(served: Shop):
    for url in (served.s3("none"), served.hub("none"), served.hub().replace("pairs", "others")):
        with pytest.raises(StoreError, match="there is no such folder"):
            open_store("pairs.root", url)
    with pytest.raises(StoreError, match=r"revision not found"):
        open_store("pairs.root", served.hub().replace(COMMIT, "f" * 40))
    (served.folder / "set" / "file").write_bytes(b"x")
    with pytest.raises(StoreError, match="is not a folder"):
        open_store("pairs.root", served.s3("set/file"))


def test_the_miniature_is_not_drawn_into_a_store():
    spec = PairsSpec(kind="miniature", root="memory://set", options={"num_pairs": 10})
    with pytest.raises(PairsError, match="say its layout"):
        open_pairs(spec)


# --- on this machine -----------------------------------------------------------------------------


def test_links_are_files(tmp_path: Path):
    """The hub's own cache is made of them."""
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.parquet").symlink_to(tmp_path / "blob")
    store = open_store("pairs.root", str(tmp_path / "set"))
    assert store.names("**/*.parquet") == ["x.parquet"]
    assert store.size("x.parquet") == 7


def test_a_disk_that_fails_is_no_missing_image(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"x")
    store = open_store("pairs.root", str(tmp_path))
    assert store.size("b" * 5000) is store.size("\0") is store.size("..") is None

    class BrokenDisk(fs.FileSystemHandler):
        """Where a disk goes; Arrow's own file system cannot be patched."""

        def open_input_file(self, path: str) -> object:
            raise OSError(5, "Input/output error")

    BrokenDisk.__abstractmethods__ = frozenset()
    broken = replace(store, files=fs.PyFileSystem(BrokenDisk()))
    with pytest.raises(StoreError, match=r"a\.png cannot be read: .*Input/output error"):
        broken.read("a.png", 0, 1)


def test_odd_names_do_not_break_a_local_listing(tmp_path: Path):
    """Arrow's own listing follows links in circles and fails at names that are no UTF-8."""
    (tmp_path / "a.tar").touch()
    (tmp_path / "circle").symlink_to(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    assert open_store("pairs.root", str(tmp_path)).names("**/*.tar") == ["a.tar"]


# --- without a network ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("s3://bucket/set", "s3.amazonaws.com"),
        ("gs://bucket/set", "storage.googleapis.com"),
        ("s3://bucket/set?endpoint_override=minio.lab:9000&scheme=http", "minio.lab"),
    ],
)
def test_without_a_network_a_bucket_is_refused_at_once(
    url: str, host: str, monkeypatch: pytest.MonkeyPatch
):
    """The clients repeat their requests for seconds; here they are not even made."""

    def nowhere(address: tuple[str, int], timeout: float) -> None:
        assert address[0] == host
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("data.storage.remote.socket.create_connection", nowhere)
    monkeypatch.setattr("data.storage.remote._file_system", None)
    with pytest.raises(UnreachableError, match=f"{host} cannot be reached .*is there a network"):
        open_store("pairs.root", url, "a hint")


def test_a_host_that_may_be_reached_in_another_way_is_left_to_the_client(
    monkeypatch: pytest.MonkeyPatch,
):
    def slow(address: tuple[str, int], timeout: float) -> None:
        raise TimeoutError

    monkeypatch.setattr("data.storage.remote.socket.create_connection", slow)
    assert no_way_to("s3://bucket/set") == ""
    monkeypatch.setattr("data.storage.remote.socket.create_connection", None)
    assert no_way_to("memory://bucket") == ""  # finds its own host
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert no_way_to("s3://bucket/set") == ""


@pytest.mark.parametrize(("local_rank", "waits"), [(0, []), (1, [LEAVE_TO_FIRST_S])])
def test_the_first_process_of_a_machine_tells_it(
    local_rank: int, waits: list[float], monkeypatch: pytest.MonkeyPatch
):
    """The others wait for the launcher, which ends them when the first has ended."""
    slept: list[float] = []
    monkeypatch.setattr("conf.job.time.sleep", slept.append)
    monkeypatch.setattr("sys.argv", ["label", "runs=/nowhere"])
    for name, value in (("RANK", local_rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))

    def main(_: object) -> None:
        raise UnreachableError("no network")

    with pytest.raises(SystemExit) as ended:
        entry(main)()
    assert ended.value.code == 2
    assert slept == waits
