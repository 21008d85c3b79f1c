"""A stand-in for the Hugging Face hub: repositories, commits and files over HTTP, in memory."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_writer"


class Hub:
    """Repositories as lists of commits, each a dict of files."""

    def __init__(self):
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, name: str, files: dict[str, bytes]) -> str:
        """Commit files on top of what a repository holds; return the commit."""
        history = self.commits.setdefault(name, [])
        whole = {**(history[-1][1] if history else {}), **files}
        digest = hashlib.sha1(repr((len(history), sorted(whole))).encode()).hexdigest()
        history.append((digest, whole))
        return digest

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit and its files: the last for main, else the one of that name."""
        history = self.commits.get(name, [])
        if revision == "main":
            return history[-1] if history else ("0" * 40, {}) if name in self.commits else None
        return next((commit for commit in history if commit[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    """Answer what huggingface_hub asks."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Keep quiet."""

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, empty: bool = False):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if not empty:
            self.wfile.write(body)

    def _json(self, content, status: int = 200):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _missing(self):
        self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def do_HEAD(self):
        self._file(empty=True)

    def do_GET(self):
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] != ["api", "models"]:
            self._file()
            return
        name, rest = "/".join(parts[2:4]), parts[4:]
        found = self.hub.at(name, rest[1] if len(rest) > 1 else "main")
        if found is None:
            if name in self.hub.commits:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            else:
                self._missing()
        elif rest[:1] == ["tree"]:
            self._json([{"type": "file", "path": p, "size": len(d), "oid": "0"} for p, d in found[1].items()])
        else:
            files = [{"rfilename": path} for path in found[1]]
            self._json({"id": name, "modelId": name, "sha": found[0], "siblings": files, "private": False})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "Invalid credentials"}, 401)
        elif parts[-1] == "create":
            request = json.loads(body)
            name = (
                f"{request['organization']}/{request['name']}"
                if "organization" in request
                else request["name"]
            )
            self.hub.commits.setdefault(name, [])
            self._json({"url": f"{self.hub.address}/{name}", "name": name})
        elif parts[-1] == "validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            )
        elif parts[4] == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            name = "/".join(parts[2:4])
            commit = self.hub.add(name, files)
            url = f"{self.hub.address}/{name}/commit/{commit}"
            self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        else:
            self._missing()

    def _file(self, *, empty: bool = False):
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        found = self.hub.at("/".join(parts[:2]), parts[3]) if len(parts) > 4 else None
        data = found[1].get("/".join(parts[4:])) if found else None
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        tags = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": found[0]}
        self._send(200, data, tags, empty=empty)
