"""A Hugging Face Hub on the loopback interface: repositories in memory, served to be loaded.

with FakeHub() as hub:
    commit = hub.add("org/model", folder)
    subprocess.run([...], env=hub.environment(tmp_path))

The client reads HF_ENDPOINT when it is imported, so it runs in a process of its own.
"""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlparse


class FakeHub:
    """The server and its repositories: {repo_id: {"gated": bool, "refs": {name: commit}, ...}}."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "FakeHub":
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering; a second call does nothing."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, repo_id: str, folder: Path, *, branch: str = "main", gated: bool = False) -> str:
        """Commit the files of `folder` to a branch; returns the commit's sha."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in files.items():
            digest.update(name.encode() + b"\0" + content)
        commit = digest.hexdigest()
        repo = self.repos.setdefault(repo_id, {"gated": gated, "refs": {}, "commits": {}})
        repo["refs"][branch] = commit
        repo["commits"][commit] = files
        return commit

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a client process that keeps its cache below `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_dummy",
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": str(home / "modules"),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what was asked is in `hub.requests`."""

    def _answer(self, *, send_body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._with_commit(match[1], match[2] or "main", self._send_info)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._with_commit(match[1], match[2], self._send_tree)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name = match[3]
            self._with_commit(
                match[1], match[2], lambda *found: self._send_file(*found, name, send_body)
            )
        else:
            self._send(404, b"{}")

    def _with_commit(self, repo_id: str, revision: str, send: Any) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repo["gated"]:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            commit = repo["refs"].get(revision, revision)
            if commit not in repo["commits"]:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                send(repo_id, commit, repo["commits"][commit])

    def _send_info(self, repo_id: str, commit: str, files: dict[str, bytes]) -> None:
        siblings = [{"rfilename": name} for name in files]
        self._send_json({"id": repo_id, "sha": commit, "siblings": siblings, "tags": []})

    def _send_tree(self, repo_id: str, commit: str, files: dict[str, bytes]) -> None:
        self._send_json(
            [
                {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
                for name, content in files.items()
            ]
        )

    def _send_file(
        self, repo_id: str, commit: str, files: dict[str, bytes], name: str, send_body: bool
    ) -> None:
        if name not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        content = files[name]
        headers = {"ETag": f'"{_blob_id(content)}"', "X-Repo-Commit": commit}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers, send_body=send_body)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        send_body: bool = True,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send_body and self.command != "HEAD":
            self.wfile.write(body)


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
