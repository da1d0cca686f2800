"""A Hugging Face Hub on this machine: the HTTP routes that huggingface_hub uses to look up and download files.

Large files are redirected to another path, as to the CDN of the real one, and are served in ranges.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import unquote

LARGE = 50_000  # Bytes; such files are in "LFS".


@dataclass
class Repo:
    """A repository.

    Attributes:
        commits: the files of each commit, by name.
        refs: the commit of each branch or tag.
        gated: whether files are refused to all.
        token: without this one, the repository cannot be seen.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Adds a commit; returns its id."""
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit


class HubServer:
    """The server, on a free port.

    Attributes:
        repos: the repositories by id.
        requests: method and path of all requests so far.
        cuts: how many bytes to send of the next large files before the connection breaks.
        down: whether every request is answered with an internal error.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.cuts: list[int] = []
        self.down = False
        self._blobs: dict[str, bytes] = {}
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another host to huggingface_hub, as the real one is: within one host it looks for the headers there.
        self.cdn = f"http://localhost:{self._server.server_port}/cdn"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """The files that were sent since the last call of this method, sorted."""
        names = sorted(
            path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/api/" not in path
        )
        self.requests.clear()
        return names


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if self.hub.down:
            self.hub.requests.append((self.command, path))
            self.send(HTTPStatus.INTERNAL_SERVER_ERROR)
        elif path.startswith("/cdn/"):
            self.hub.requests.append((self.command, path))
            self.send_blob(path.split("/")[2])
        elif path.startswith("/api/models/"):
            self.hub.requests.append((self.command, path))
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self.send_info(repo, revision or "main")
        else:
            repo, _, rest = path.removeprefix("/").partition("/resolve/")
            self.send_file(repo, *rest.split("/", 1))

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; None if there is none, which has been answered then."""
        repo, authorization = self.hub.repos.get(name), self.headers.get("Authorization")
        if authorization is not None and authorization not in ("Bearer hf_good", "Bearer hf_other"):
            self.send(HTTPStatus.UNAUTHORIZED, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.token is not None and authorization != f"Bearer {repo.token}"):
            status = HTTPStatus.UNAUTHORIZED if authorization is None else HTTPStatus.NOT_FOUND
            self.send(status, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif (commit := repo.refs.get(revision, revision)) not in repo.commits:
            self.send(HTTPStatus.NOT_FOUND, {"X-Error-Code": "RevisionNotFound"})
        else:
            return commit, repo.commits[commit]
        return None

    def send_info(self, repo: str, revision: str) -> None:
        if found := self.files(repo, revision):
            commit, files = found
            info = {
                "_id": "1",
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            info["siblings"] = [{"rfilename": name} for name in sorted(files)]
            self.send(HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def send_file(self, repo: str, revision: str, name: str) -> None:
        if (found := self.files(repo, revision)) is None:
            return
        commit, files = found
        commit_header = {"X-Repo-Commit": commit}
        if self.hub.repos[repo].gated:
            self.send(HTTPStatus.FORBIDDEN, {"X-Error-Code": "GatedRepo", **commit_header})
        elif name not in files:
            self.send(HTTPStatus.NOT_FOUND, {"X-Error-Code": "EntryNotFound", **commit_header})
        elif len(files[name]) < LARGE:
            self.hub.requests.append((self.command, name))
            self.send(
                HTTPStatus.OK, {"ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"', **commit_header}, files[name]
            )
        else:
            blob = hashlib.sha256(files[name]).hexdigest()
            self.hub._blobs[blob] = files[name]
            linked = {"X-Linked-Etag": f'"{blob}"', "X-Linked-Size": str(len(files[name]))}
            self.send(HTTPStatus.FOUND, {"Location": f"{self.hub.cdn}/{blob}/{name}", **linked, **commit_header})

    def send_blob(self, blob: str) -> None:
        data, asked = self.hub._blobs[blob], self.headers.get("Range")
        headers = {"ETag": f'"{blob}"', "Accept-Ranges": "bytes"}
        begin = 0
        if asked:
            self.hub.ranges.append(asked)
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cuts.pop(0) if self.command == "GET" and self.hub.cuts else None
        self.send(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK, headers, data[begin:], cut)

    def send(
        self, status: HTTPStatus, headers: dict[str, str] | None = None, body: bytes = b"", cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
