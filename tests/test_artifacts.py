"""Whole or absent, verified, and never mixed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.artifacts import atomic
from data.artifacts.atomic import (
    ShardError,
    partial_path,
    remove_partials,
    sha256_of,
    sha256_of_folder,
    write_bytes,
    write_json,
)
from data.artifacts.config_diff import differences, refuse_other_settings
from data.artifacts.manifest import (
    MANIFEST,
    Manifest,
    describe,
    part_name,
    read_manifest,
    verify,
    write_manifest,
)
from data.artifacts.parquet_io import read_settings, read_table, write_table

SETTINGS = {"metric": {"kind": "clip", "dtype": "fp32"}, "source": "a.parquet"}


@pytest.fixture
def table() -> pa.Table:
    return pa.table({"pair_id": [f"{i:032x}-0" for i in range(1000)], "blob": [b"x" * 50] * 1000})


def make_set(folder: Path, table: pa.Table) -> Manifest:
    path = folder / part_name(0)
    write_table(path, table, SETTINGS, row_group_rows=300)
    manifest = Manifest(kind="test", settings=SETTINGS, files=[describe(path)])
    write_manifest(folder, manifest)
    return manifest


def test_a_set_comes_back_as_it_was_written(tmp_path: Path, table: pa.Table):
    manifest = make_set(tmp_path, table)
    assert manifest.rows == 1000
    assert manifest.files[0].row_groups == [300, 300, 300, 100]
    loaded = read_manifest(tmp_path, "test")
    assert loaded is not None
    assert loaded.files == manifest.files
    assert loaded.settings == SETTINGS
    verify(tmp_path, loaded)
    assert read_table(tmp_path / "part-00000.parquet").equals(table)
    assert read_settings(tmp_path / "part-00000.parquet") == SETTINGS
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_identity_is_that_of_the_rows_alone(tmp_path: Path, table: pa.Table):
    manifest = make_set(tmp_path, table)
    noted = replace(manifest, provenance={"batch": 7}, code_revision="another", counts={"ok": 1000})
    assert noted.identity == manifest.identity
    other = replace(manifest, files=[replace(manifest.files[0], sha256="0" * 64)])
    assert other.identity != manifest.identity


def test_blobs_are_stored_as_they_are(tmp_path: Path, table: pa.Table):
    path = tmp_path / "part.parquet"
    write_table(path, table, blobs=["blob"])
    group = pq.read_metadata(path).row_group(0)
    ids, blobs = group.column(0), group.column(1)
    assert (ids.compression, blobs.compression) == ("ZSTD", "UNCOMPRESSED")
    assert ids.statistics is not None
    assert blobs.statistics is None
    assert "RLE_DICTIONARY" not in blobs.encodings
    assert read_table(path).equals(table)


def test_the_same_table_gives_the_same_bytes(tmp_path: Path, table: pa.Table):
    for name in ("a", "b"):
        write_table(tmp_path / name, table, SETTINGS)
    assert sha256_of(tmp_path / "a") == sha256_of(tmp_path / "b")


def test_an_unfinished_set_has_no_manifest(tmp_path: Path, table: pa.Table):
    write_table(tmp_path / "part-00000.parquet", table)
    assert read_manifest(tmp_path, "test") is None


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    table = pa.table({"x": [1]})
    for write, content in ((write_bytes, b"content"), (write_table, table)):
        with pytest.raises(ShardError, match=r"file cannot be written .*No space left.*free some"):
            write(tmp_path / "file", content)
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(ShardError, match=r"runs/x/file cannot be written .*make its folder writ"):
        write_json(tmp_path / "runs" / "x" / "file", {})


def test_a_failed_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(atomic.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(ShardError, match="full"):
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_partial_files_are_removed_though_another_process_removes_one_meanwhile(tmp_path: Path):
    old, young = (partial_path(tmp_path / name) for name in ("part-00000", "part-00001"))
    for path, time in ((old, 100.0), (young, 300.0)):
        path.touch()
        os.utime(path, (time, time))
    gone = partial_path(tmp_path / "part-00002")
    gone.symlink_to("nothing")  # it is listed, and then there is no such file
    remove_partials(tmp_path, since=200.0)
    assert set(tmp_path.iterdir()) == {young, gone}


def test_a_flipped_bit_is_named(tmp_path: Path, table: pa.Table):
    manifest = make_set(tmp_path, table)
    path = tmp_path / "part-00000.parquet"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"part-00000\.parquet has other bytes"):
        verify(tmp_path, manifest)
    with pytest.raises(ShardError, match=r"part-00000\.parquet cannot be read"):
        read_table(path)


def test_a_torn_file_is_named(tmp_path: Path, table: pa.Table):
    make_set(tmp_path, table)
    path = tmp_path / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    for read in (read_table, read_settings):
        with pytest.raises(ShardError, match="delete it and run the same command again"):
            read(path)


def test_a_missing_file_is_named(tmp_path: Path, table: pa.Table):
    manifest = make_set(tmp_path, table)
    (tmp_path / "part-00000.parquet").unlink()
    with pytest.raises(ShardError, match=r"part-00000\.parquet is missing"):
        verify(tmp_path, manifest)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "cannot be read"), ("{", "cannot be read"), ("[]", "has a JSON list"),
        ('{"kind": "test"}', "does not describe a set"),
        ('{"kind": "test", "settings": {}, "files": []}', "it lists no file"),
        ('{"kind": "test", "settings": [], "files": []}', "does not describe a set"),
    ],
)  # fmt: skip
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str, problem: str):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ShardError, match=rf"manifest\.json {problem}|manifest\.json .*{problem}"):
        read_manifest(tmp_path, "test")


def test_another_kind_or_version_is_refused(tmp_path: Path, table: pa.Table):
    make_set(tmp_path, table)
    with pytest.raises(ShardError, match="it is a test set of version 1"):
        read_manifest(tmp_path, "labels")
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(ShardError, match="version 99"):
        read_manifest(tmp_path, "test")


def test_other_settings_are_refused_with_the_difference(tmp_path: Path):
    wanted = {"metric": {"kind": "clip", "dtype": "bf16"}, "source": "a.parquet", "seed": 1}
    assert differences(SETTINGS, wanted) == [
        "metric.dtype: found fp32, now bf16",
        "seed: found nothing, now 1",
    ]
    refuse_other_settings(tmp_path, SETTINGS, dict(SETTINGS))
    with pytest.raises(ShardError, match="found fp32, now bf16"):
        refuse_other_settings(tmp_path, SETTINGS, wanted)


def test_a_folder_has_one_hash_over_names_and_bytes(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"1")
    before = sha256_of_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert sha256_of_folder(tmp_path) != before
