"""What W&B is to a client: a reader of its offline records, and a small server on this machine.

The server keeps what `wandb sync` sends, and answers as W&B does to a run that it knows already, so
that a test can look at what a user would see in the browser.
"""

from __future__ import annotations

import gzip
import json
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, with a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B", data[:4]
    position, whole = _HEADER, b""
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        whole += data[position + _HEADER : position + _HEADER + length]
        position += _HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@dataclass
class OfflineRun:
    """A .wandb file as what it would put on the server."""

    path: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @classmethod
    def read(cls, path: Path) -> OfflineRun:
        found = cls(path)
        for record in records(path):
            kind = record.WhichOneof("record_type")
            content = getattr(record, kind)
            if kind == "run":
                found.run = content
                found.config = {i.key: json.loads(i.value_json) for i in content.config.update}
            elif kind == "history":
                found.history.append(_items(content.item))
            elif kind == "summary":
                found.summary |= _items(content.update)
            elif kind == "artifact":
                found.artifacts[content.name] = content
            elif kind == "exit":
                found.exit_code = content.exit_code
        return found


def _items(items: Any) -> dict[str, Any]:
    """Nested keys joined by dots, as W&B names them."""
    return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}


def offline_runs(folder: Path) -> list[OfflineRun]:
    """All that is in `folder`/wandb, in the order of time."""
    files = sorted((Path(folder) / "wandb").glob("offline-run-*/*.wandb"))
    return [OfflineRun.read(file) for file in files]


# --------------------------------------------------------------------------------- the server


@dataclass
class ServedRun:
    """A run as the server has it."""

    name: str
    about: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Rows by their place in the stream."""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    files: set[str] = field(default_factory=set)


class Server:
    """W&B's server, as far as `wandb sync` needs one."""

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self.views: list[dict[str, Any]] = []
        self.unknown: set[str] = set()
        self.deleted: set[str] = set()
        """Ids that it answers as W&B does once a run was deleted."""
        self.refused: list[str] = []
        """The deleted ids that were asked for."""
        server = self

        class Handler(_Handler):
            owner = server

        self.http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        method = getattr(self, f"on_{operation}", None)
        if method is None:
            self.unknown.add(operation)
            return {}
        return method(variables)

    def on_RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        if run is None:
            return {"model": None}
        last = run.history[max(run.history)] if run.history else {}
        bucket = {
            "id": run.name,
            "name": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(last)]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": run.about.get("tags") or [],
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {"id": "P", "name": v["project"], "bucket": bucket}}

    def on_UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        if v["name"] in self.deleted:
            self.refused.append(v["name"])
            raise _Conflict("run was previously created and deleted; try a new run name")
        run = self.runs.setdefault(v["name"], ServedRun(v["name"]))
        run.about |= {key: value for key, value in v.items() if value is not None}
        entity = {"id": "E", "name": v.get("entity") or "someone"}
        project = {"id": "P", "name": v["project"], "entity": entity}
        bucket = {"id": run.name, "name": run.name, "displayName": v["displayName"] or run.name}
        bucket |= {"config": "{}", "project": project, "historyLineCount": len(run.history)}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def on_CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        self.runs[v["run"]].files |= set(v["files"])
        files = [
            {"name": name, "uploadUrl": f"{self.url}/upload/{v['run']}/{name}"}
            for name in v["files"]
        ]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def on_CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        given = v["input"]
        name = given["artifactCollectionName"]
        self.artifacts[name] = {"type": given["artifactTypeName"], "run": given["runName"]}
        artifact = {"id": name, "state": "PENDING", "artifactSequence": {"id": name}}
        return {"createArtifact": {"artifact": artifact}}

    def on_CreateArtifactManifest(self, v: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/upload/manifest/{v['artifactID']}"
        file = {"id": "F", "name": v["name"], "displayName": v["name"], "uploadUrl": url}
        return {
            "createArtifactManifest": {
                "artifactManifest": {"id": v["artifactID"], "file": file | {"uploadHeaders": []}}
            }
        }

    def on_CreateArtifactFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in v["input"]["artifactFiles"]:
            path = f"artifact/{file['artifactID']}/{file['name']}"
            node = {"id": path, "name": file["name"], "displayName": file["name"]}
            node |= {"uploadUrl": f"{self.url}/upload/{path}", "uploadHeaders": []}
            node |= {"storagePath": path, "artifact": {"id": file["artifactID"]}}
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[v["artifactID"]]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": ""}}}

    def on_UpsertView2(self, v: dict[str, Any]) -> dict[str, Any]:
        self.views.append(v)
        return {"upsertView": {"view": {"id": "V", "name": "nw-abc-v"}, "inserted": True}}

    def on_Viewer(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "U", "entity": "someone", "username": "someone", "flags": "{}"}}

    def on_post(self, path: str) -> None:
        """Told of every request that sends something."""

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.runs[name]
        for file, chunk in (sent.get("files") or {}).items():
            rows = [json.loads(line) for line in chunk["content"] if line]
            if file == "wandb-history.jsonl":
                run.history |= {chunk["offset"] + i: row for i, row in enumerate(rows)}
            elif file == "wandb-summary.json" and rows:
                run.summary = rows[-1]
        if "exitcode" in sent:
            run.exit_code = sent["exitcode"]


class _Conflict(Exception):
    """An answer with the status 409."""


class _Http(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients leave without a word
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Server

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self.owner.uploads[self.path.removeprefix("/upload/")] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        self.owner.on_post(self.path)
        body = self._body()
        sent = json.loads(body) if body.startswith(b"{") else {}
        if self.path.endswith("/graphql"):
            name = sent.get("operationName") or sent["query"].split("(")[0].split()[1]
            try:
                self._reply({"data": self.owner.answer(name, sent.get("variables") or {})})
            except _Conflict as conflict:
                self._reply({"errors": [{"message": str(conflict)}]}, 409)
            return
        if self.path.endswith("/file_stream"):
            self.owner.stream(self.path.split("/")[-2], sent)
        self._reply({})
