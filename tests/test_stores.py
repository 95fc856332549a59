"""Pair sets in object stores: the real clients of S3 and the hub against a local server."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from data.pairs import open_pairs
from data.pairs.config import Images, PairsKind, PairsSpec
from data.pairs.schema import PairsError
from data.storage import open_store, remote
from data.storage.base import StoreError, ahead
from data.storage.local import LocalStore
from data.storage.remote import RemoteStore
from tests.helpers_pairs import (
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


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, which take no time."""
    found: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", found.append)
    return found


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


@pytest.mark.parametrize("kind", list(PairsKind))
def test_every_layout_gives_the_same_rows_from_every_store(kind: PairsKind, served: Shop):
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
    spec = spec_of(served.folder / "set", PairsKind.jsonl, Images.paths, human="")
    (found,) = rows_of(open_pairs(replace(spec, root=served.s3("set"))))
    assert (found["image_0"], found["image_1"]) == (image(0), None)


def test_contents_are_named_without_being_fetched(served: Shop):
    make_set(PairsKind.pickapic, served.folder / "set")
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
    spec = replace(make_set(PairsKind.hpdv2, served.folder / "set"), root=served.s3("set"))
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


def test_row_groups_are_asked_for_by_need(served: Shop, monkeypatch: pytest.MonkeyPatch):
    """Reading one row group of many fetches little of the file."""
    monkeypatch.setattr(remote, "BUFFER_BYTES", 1 << 16)
    table = pickapic(rows=8, jpg_0=[bytes([i]) * (1 << 20) for i in range(8)])
    path = served.folder / "set" / "train.parquet"
    pq.write_table(table, path, row_group_size=1, compression="none", use_dictionary=False)
    source = open_pairs(PairsSpec(root=served.s3("set")))
    store = source.store  # type: ignore[attr-defined]
    fetched = 0

    class Counting(RemoteStore):
        def ask(self, what, name, request):
            nonlocal fetched
            found = super().ask(what, name, request)
            fetched += len(found) if isinstance(found, bytes) else 0
            return found

    counting = replace(source, store=Counting(store.url, store.files, store.folder))  # type: ignore[type-var]
    (pair,) = counting.read_row_group(source.shards[0], 3).to_pylist()
    assert pair["image_0"] == bytes([3]) * (1 << 20)
    assert 1 << 20 < fetched < 2 << 20 < path.stat().st_size


# --- a store that fails --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["s3", "hub", "memory"])
def test_what_may_pass_is_asked_for_again(
    way: str, served: Shop, pauses: list[float], monkeypatch: pytest.MonkeyPatch
):
    spec = make_set(PairsKind.pickapic, served.folder / "set")
    rows = rows_of(open_pairs(spec))
    url = {"s3": served.s3("set"), "hub": served.hub("set"), "memory": urls(served)[1]}[way]
    source = open_pairs(replace(spec, root=url))
    served.failures[:] = [500, "cut", 503] if way != "memory" else []
    if way == "memory":  # whose client repeats nothing itself
        left = iter([OSError("reset"), TimeoutError(), EOFError()])

        class Failing(io.BytesIO):
            def read(self, size: int = -1) -> bytes:
                if (error := next(left, None)) is not None:
                    raise error
                return super().read(size)

        files = source.store.files  # type: ignore[attr-defined]
        monkeypatch.setattr(files, "open", lambda path, *_, **__: Failing(files.cat_file(path)))
    assert rows_of(source) == rows
    assert not served.failures
    assert pauses == ([1.0, 4.0, 16.0] if way == "memory" else pauses)


def test_half_an_answer_is_no_answer(pauses: list[float]):
    class Short:
        tries = 0

        def info(self, path: str) -> dict[str, object]:
            return {"name": path, "size": 100, "type": "file"}

        def open(self, path: str, mode: str, **_: object) -> io.BytesIO:
            self.tries += 1
            return io.BytesIO(b"x" * (50 if self.tries < 3 else 100))

    store = RemoteStore("x://set", Short(), "set")
    assert store.read("file", 0, 1000) == b"x" * 100
    assert pauses == [1.0, 4.0]


def test_what_does_not_pass_ends_with_what_to_do(served: Shop, pauses: list[float]):
    class Broken:
        error: Exception = OSError("connection reset")
        tries = 0

        def info(self, path: str) -> dict[str, object]:
            self.tries += 1
            raise self.error

    store = RemoteStore("x://set", Broken(), "set")
    with pytest.raises(
        StoreError, match=r"x://set/a.png cannot be found, 4 times in a row .*reset.*same command"
    ):
        store.size("a.png")
    assert pauses == list(remote.WAITS_S)
    pauses.clear()
    for error in (PermissionError("denied"), OSError("AWS Error ACCESS_DENIED during HeadObject")):
        store.files.error = error
        with pytest.raises(StoreError, match="cannot be found: .*(denied|DENIED)"):
            store.size("a.png")
    store.files.error = FileNotFoundError("a.png")
    assert store.size("a.png") is None
    assert not pauses


def test_a_failing_store_is_no_missing_image(served: Shop, pauses: list[float]):
    """A pair's status must not depend on the network of that day."""
    spec = make_set(PairsKind.hpdv3, served.folder / "set")
    source = open_pairs(replace(spec, root=served.s3("set")))
    served.failures[:] = [403]
    with pytest.raises(StoreError, match=r"s3://bucket/set/images/.\.jpg cannot be read.*DENIED"):
        list(source.read(source.shards[0]))
    (served.folder / "set" / "images" / "1.jpg").unlink()
    assert [row["image_0"] is None or row["image_1"] is None for row in rows_of(source)] == [
        True
    ] * 5


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
    with pytest.raises(StoreError, match=message) as found:
        open_store("pairs.root", url, "a hint")
    assert "secret" not in str(found.value)


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
    with pytest.raises(PairsError, match="say what is there"):
        open_pairs(PairsSpec(root="memory://set", miniature_pairs=10))


# --- on this machine -----------------------------------------------------------------------------


def test_links_are_files(tmp_path: Path):
    """The hub's own cache is made of them."""
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.parquet").symlink_to(tmp_path / "blob")
    store = LocalStore(tmp_path / "set")
    assert store.names("**/*.parquet") == ["x.parquet"]
    assert store.size("x.parquet") == 7


def test_a_disk_that_fails_is_no_missing_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.png").write_bytes(b"x")
    store = LocalStore(tmp_path)
    assert store.size("b" * 5000) is store.size("\0") is store.size("..") is None

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(StoreError, match=r"a\.png cannot be read: .*Input/output error"):
        store.read("a.png", 0, 1)


def test_items_made_ahead_come_in_order_and_stop():
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    assert list(ahead(items(), 3)) == list(range(100))
    made.clear()
    for item in ahead(items(), 3):
        if item == 5:
            break
    assert len(made) <= 10

    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        list(ahead(failing(), 3))
