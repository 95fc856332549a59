"""A server that speaks as much of S3 and of the Hugging Face hub as readers need."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "owner/pairs"
TIME = "Mon, 01 Jan 2024 00:00:00 GMT"


@dataclass
class Shop:
    """What a server serves and how it behaves."""

    folder: Path
    url: str = ""
    requests: list[str] = field(default_factory=list)
    bytes_sent: int = 0
    failures: list[int | str] = field(default_factory=list)
    """What becomes of the next reads of a file: a status, or `cut` for half an answer."""

    def s3(self, below: str = "") -> str:
        host = self.url.removeprefix("http://")
        path = f"bucket/{below}".rstrip("/")
        return f"s3://{path}?endpoint_override={host}&scheme=http&region=us-east-1"

    def hub(self, below: str = "") -> str:
        return f"hf://datasets/{REPO}@{COMMIT}/{below}".rstrip("/")

    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shop: Shop

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self._serve(body)

    def _serve(self, body: bytes = b"") -> None:
        parts = urlsplit(self.path)
        self.shop.requests.append(f"{self.command} {self.path}")
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        path = unquote(parts.path)
        if path.startswith("/api/datasets/"):
            known = path.startswith(f"/api/datasets/{REPO}/")
            below = path.removeprefix(f"/api/datasets/{REPO}")
            self._hub(below, body) if known else self._answer(404, X_Error_Code="RepoNotFound")
        elif match := re.fullmatch(rf"/datasets/{REPO}/resolve/{COMMIT}/(.*)", path):
            self._file(match.group(1))
        elif path.rstrip("/") == "/bucket":
            self._list(query) if self.command == "GET" else self._answer(200)
        else:
            self._file(path.removeprefix("/bucket/"))

    def _answer(self, status: int, body: bytes = b"", cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.shop.bytes_sent += len(body)
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def _file(self, name: str) -> None:
        content = self.shop.files().get(name)
        if content is None:
            self._answer(404)
            return
        failure = None
        if self.command == "GET" and self.shop.failures:
            failure = self.shop.failures.pop(0)
        if isinstance(failure, int):
            self._answer(failure)
            return
        headers = {
            "ETag": etag(content),
            "Last_Modified": TIME, "Accept_Ranges": "bytes",
        }  # fmt: skip
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "HEAD":
            self._answer(200, Content_Length=str(len(content)), **headers)
        elif wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            self._answer(206, content[start : end + 1], cut=failure == "cut", **headers)
        else:
            self._answer(200, content, cut=failure == "cut", **headers)

    # --- S3 --------------------------------------------------------------------------------------

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = int(query.get("max-keys", "1000"))
        keys, folders = [], []
        for name, content in self.shop.files().items():
            if not name.startswith(prefix):
                continue
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                folders.append(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                keys.append((name, content))
        entries = "".join(
            f"<Contents><Key>{name}</Key><Size>{len(content)}</Size>"
            f"<LastModified>2024-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{etag(content)}</ETag></Contents>"
            for name, content in keys[:most]
        )
        entries += "".join(
            f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>"
            for folder in dict.fromkeys(folders)
        )
        body = (
            '<?xml version="1.0"?><ListBucketResult><Name>bucket</Name><IsTruncated>false'
            f"</IsTruncated><KeyCount>{len(keys)}</KeyCount>{entries}</ListBucketResult>"
        )
        self._answer(200, body.encode(), Content_Type="application/xml")

    # --- the hub ---------------------------------------------------------------------------------

    def _hub(self, path: str, body: bytes) -> None:
        if path.startswith("/revision/") or not path:
            known = path in ("", f"/revision/{COMMIT}")
            value: object = {"id": REPO, "sha": COMMIT, "siblings": []}
            self._json(value) if known else self._answer(404, X_Error_Code="RevisionNotFound")
        elif path.startswith(f"/tree/{COMMIT}"):
            below = path.removeprefix(f"/tree/{COMMIT}").strip("/")
            deep = "recursive=true" in self.path.lower()
            self._json(self._tree(below, deep))
        elif path == f"/paths-info/{COMMIT}":
            wanted = parse_qs(body.decode()).get("paths", []) or json.loads(body)["paths"]
            self._json([entry for entry in self._tree("", True) if entry["path"] in wanted])
        else:
            self._answer(404)

    def _tree(self, below: str, deep: bool) -> list[dict[str, object]]:
        files, folders = [], []
        for name, content in self.shop.files().items():
            if below and not name.startswith(f"{below}/"):
                continue
            rest = name.removeprefix(f"{below}/") if below else name
            parents = rest.split("/")[:-1]
            shown = parents if deep else parents[:1]
            folders += [
                "/".join([below, *parents[: depth + 1]]).strip("/") for depth in range(len(shown))
            ]
            if deep or not parents:
                oid = hashlib.sha256(content).hexdigest()
                lfs = {"oid": oid, "size": len(content), "pointerSize": 130}
                files.append({"type": "file", "path": name, "oid": oid[:40],
                              "size": len(content), "lfs": lfs})  # fmt: skip
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
                 for path in dict.fromkeys(folders)]  # fmt: skip
        return [*entries, *files]

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")


@contextmanager
def shop(folder: Path) -> Iterator[Shop]:
    """Serve a folder until the end of the block."""
    served = Shop(folder)
    handler = type("Handler", (_Handler,), {"shop": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""So that no client looks for others."""


def served_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """A fixture: a store with the empty folder `set` in it, which both real clients take for it."""
    (tmp_path / "served" / "set").mkdir(parents=True)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with shop(tmp_path / "served") as served:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        HfFileSystem.clear_instance_cache()
        yield served
    HfFileSystem.clear_instance_cache()
