"""A stand-in for the Hugging Face hub on loopback: what `snapshot_download` asks of it, over real HTTP."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


class Hub:
    """One repository.

    Attributes:
        revisions: names of branches and tags, and the commits that they are at.
        commits: the folder of each commit.
        asked: paths of the requests so far.
    """

    def __init__(self, repository: str, commits: dict[str, Path], revisions: dict[str, str]) -> None:
        self.repository, self.commits, self.revisions = repository, commits, revisions
        self.asked: list[str] = []
        self.url = ""


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *request, hub: Hub) -> None:
        self.hub = hub
        super().__init__(*request)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        api, files = f"/api/models/{self.hub.repository}", f"/{self.hub.repository}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            self._info(path.removeprefix(api).removeprefix("/revision/") or "main")
        elif path.startswith(f"{api}/tree/"):
            self._json(self._tree(path.removeprefix(f"{api}/tree/")))
        elif path.startswith(files):
            commit, _, name = path.removeprefix(files).partition("/")
            self._send((self.hub.commits[commit] / name).read_bytes(), commit)
        else:
            self._refuse("RepoNotFound")

    def _info(self, revision: str) -> None:
        commit = self.hub.revisions.get(revision, revision)
        if commit not in self.hub.commits:
            self._refuse("RevisionNotFound")
            return
        files = [{"rfilename": file["path"], "size": file["size"]} for file in self._tree(commit)]
        self._json({"id": self.hub.repository, "sha": commit, "siblings": files})

    def _tree(self, commit: str) -> list[dict]:
        folder = self.hub.commits[commit]
        files = [each for each in sorted(folder.rglob("*")) if each.is_file()]
        return [
            {
                "type": "file",
                "path": each.relative_to(folder).as_posix(),
                "size": each.stat().st_size,
                "oid": hashlib.sha1(each.read_bytes()).hexdigest(),
            }
            for each in files
        ]

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode())

    def _send(self, content: bytes, commit: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving(handler) -> Iterator[str]:
    """A server with this handler; yields its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def hub_of(hub: Hub) -> Iterator[Hub]:
    with serving(partial(_Handler, hub=hub)) as hub.url:
        yield hub
