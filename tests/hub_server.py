"""A Hub on the loopback, in the standard library: as much of its HTTP as huggingface_hub and
datasets ask for, with the faults that people meet.

    with Server() as hub:
        hub.push("someone/sdxl", {"model_index.json": b"{}"})
        hub.fail("/resolve/", 503)

What was asked is in hub.asked; large files are redirected to another host name, as the Hub does.
"""

import contextlib
import hashlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 100_000  # bytes from which on a file is kept as LFS does: told by its SHA-256, redirected
PORTAL = b"<html><title>Hotel Wi-Fi</title>Please log in.</html>"
SAID = {  # status: X-Error-Code and X-Error-Message
    401: ("RepoNotFound", "Invalid username or password."),
    403: ("GatedRepo", "Access to this repository is restricted and you are not in its list."),
    404: ("RepoNotFound", "Repository not found"),
    429: ("", "We had to rate limit you"),
    503: ("", "Service unavailable"),
}


class Server(ThreadingHTTPServer):
    """Serves repositories pushed as {path: bytes or a file}; a "datasets/..." name is a data set.

    fail(part, kind, times): requests whose path holds `part` meet a fault, `times` times: a status,
    "portal" (a page of another's), "hang" (no answer), "cut" (half the body, then nothing more),
    "drip" (a piece of the body at a time) or "invalid token".
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, dict[str, bytes | Path]]] = {}  # name: commit: path
        self.faults: list[list] = []
        self.asked: list[str] = []
        self.pieces = (1000, 0.05)  # of a drip: bytes, seconds between
        self.after: Callable[[str], None] = lambda path: None  # called with each request answered
        self.over = threading.Event()
        self.connections = []

    def process_request(self, request, client_address) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> None:
        """Be away: from now on connections are refused."""
        if not self.over.is_set():
            self.over.set()
            self.shutdown()
            self.server_close()
            for connection in self.connections:  # those that a client keeps open
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def push(self, name: str, files: dict[str, bytes | Path]) -> str:
        """A commit of these files on main. Returns it."""
        commits = self.repos.setdefault(name, {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        return commit

    def fail(self, part: str, kind: int | str, times: float = float("inf")) -> None:
        self.faults.append([part, kind, times])

    def fault_of(self, path: str) -> int | str | None:
        for fault in self.faults:
            if fault[0] in path and fault[2] > 0:
                fault[2] -= 1
                return fault[1]
        return None

    def handle_error(self, *_) -> None:
        """A client that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        kind = self.server.fault_of(path)
        if kind == "hang":
            self.server.over.wait()
            self.close_connection = True
        elif kind == "portal":
            self.send(200, PORTAL, {"Content-Type": "text/html; charset=utf-8"})
        elif kind == "invalid token":
            self.refuse(401, ("", "Invalid credentials in Authorization header"))
        elif isinstance(kind, int):
            self.refuse(kind, SAID[kind])
        else:
            self.answer(path, kind)
        self.server.after(path)

    do_HEAD = do_POST = do_GET

    def answer(self, path: str, kind: str | None) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        told = parse_qs(self.rfile.read(length).decode()) if length else {}
        if path.startswith("/cdn/"):
            file = next(f for f in self.all_files() if etag(f) == path.removeprefix("/cdn/"))
            self.send(200, content(file), {"ETag": f'"{etag(file)}"'}, kind)
            return
        match = re.fullmatch(
            r"/(?:api/)?(?:models/)?((?:datasets/)?[\w.-]+/[\w.-]+)"
            r"(?:/(revision|tree|resolve|paths-info)/([^/]+)/?(.*))?",
            path,
        )
        if not match or match[1] not in self.server.repos:
            self.refuse(401, SAID[401])  # as the Hub does for what one may not even know of
            return
        name, verb, revision, rest = match.groups()
        commits = self.server.repos[name]
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            self.refuse(404, ("RevisionNotFound", f"Invalid rev id: {revision}"))
        elif verb == "resolve":
            self.send_file(commit, commits[commit], rest, kind)
        else:
            self.send_json(verb, name, commit, commits[commit], rest, told, kind)

    def all_files(self):
        commits = itertools.chain(*(each.values() for each in self.server.repos.values()))
        return itertools.chain(*(files.values() for files in commits))

    def send_file(self, commit: str, files: dict, path: str, kind: str | None) -> None:
        head = {"X-Repo-Commit": commit}
        if path not in files:
            self.refuse(404, ("EntryNotFound", "Entry not found"), head)
            return
        file, size = files[path], size_of(files[path])
        if size < LARGE:
            self.send(200, content(file), head | {"ETag": f'"{etag(file)}"'}, kind)
            return
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")
        head |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{etag(file)}"'}
        self.send(302, b"", head | {"Location": f"{elsewhere}/cdn/{etag(file)}"})

    def send_json(self, verb, name, commit, files, under, told, kind) -> None:
        """What the API says of a repository: itself, or entries of its tree."""
        entries = [entry(path, file) for path, file in sorted(files.items())]
        folders = {"/".join(parts[:i]) for parts in map(split, files) for i in range(1, len(parts))}
        entries += [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
        if verb == "paths-info":
            body = [each for each in entries if each["path"] in told.get("paths", [])]
        elif verb == "tree":
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower()
            above = f"{under}/" if under else ""
            body = [each for each in entries if each["path"].startswith(above)]
            if deep != "true":
                body = [each for each in body if "/" not in each["path"][len(above) :]]
            if under and not body:
                self.refuse(404, ("EntryNotFound", f"{under} does not exist"))
                return
        else:
            body = {"id": name.removeprefix("datasets/"), "sha": commit, "private": False}
            body |= {"tags": [], "gated": False, "disabled": False, "downloads": 0}
            body["siblings"] = [{"rfilename": p, "size": size_of(f)} for p, f in files.items()]
        self.send(200, json.dumps(body).encode(), {"Content-Type": "application/json"}, kind)

    def refuse(self, status: int, said: tuple[str, str], head: dict | None = None) -> None:
        code, message = said
        head = {"X-Error-Message": message, "Content-Type": "application/json"} | (head or {})
        head |= {"X-Error-Code": code} if code else {}
        self.send(status, json.dumps({"error": message}).encode(), head)

    def send(self, status: int, body: bytes, head: dict, kind: str | None = None) -> None:
        total = len(body)
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            body, status = body[int(asked[1]) :], 206
            head = head | {"Content-Range": f"bytes {asked[1]}-{total - 1}/{total}"}
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **head}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        size, wait = self.server.pieces if kind == "drip" else (len(body) or 1, 0)
        for start in range(0, len(body), size):
            if self.server.over.is_set():
                break
            self.wfile.write(body[start : start + size])
            time.sleep(wait)


def ask_again() -> None:
    """Have the model asked for as a new process does."""
    from inputs import hub

    for each in (hub.snapshot, hub.vae_from_hub, hub.file_of):
        each.cache_clear()
    hub.announced.clear()
    hub.REVISIONS.clear()
    hub.VAES.clear()


def entry(path: str, file: bytes | Path) -> dict:
    """A file as the tree API tells it."""
    told = {"type": "file", "path": path, "size": size_of(file), "oid": etag(file)[:40]}
    large = told["size"] >= LARGE
    lfs = {"oid": etag(file), "size": told["size"], "pointerSize": 134}
    return told | ({"lfs": lfs} if large else {})


def etag(file: bytes | Path) -> str:
    """git's name of the content, or its SHA-256 where LFS keeps it."""
    return _etag(content(file)) if isinstance(file, bytes) else _kept(file)


def _etag(data: bytes) -> str:
    if len(data) >= LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


ETAGS: dict[Path, str] = {}


def _kept(path: Path) -> str:
    if path not in ETAGS:
        ETAGS[path] = _etag(path.read_bytes())
    return ETAGS[path]


def content(file: bytes | Path) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def size_of(file: bytes | Path) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def split(path: str) -> list[str]:
    return path.split("/")


@contextlib.contextmanager
def serving(patch, folder: Path):
    """A server which the real clients ask, with caches of their own in `folder`; `patch`: a
    pytest.MonkeyPatch. The clients read the environment when they are imported: what they then keep
    is set instead.
    """
    import datasets
    import huggingface_hub

    constants = huggingface_hub.constants
    with Server() as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.delenv(name, raising=False)
            patch.delenv(name.lower(), raising=False)
        of_file = "/{repo_id}/resolve/{revision}/"
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + of_file + "{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
        patch.setattr(
            datasets.config, "HUB_DATASETS_URL", f"{server.url}/datasets{of_file}" + "{path}"
        )
        patch.delenv("HF_TOKEN", raising=False)
        huggingface_hub.close_session()  # its client has the old settings
        yield server
    huggingface_hub.close_session()
