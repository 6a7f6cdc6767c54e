"""A real HTTP server on this machine that goes wrong on demand."""

import contextlib
import hashlib
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """A file at an address, and what goes wrong with it."""

    body: bytes
    etag: str | None = None
    """The ETag; None sends none and no date either."""
    ranges: bool = True
    """Whether `Range` is understood; else every answer is the whole file."""
    cuts: list[int] = field(default_factory=list)
    """After how many bytes of the body each of the first answers is cut."""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Status and headers of the first answers, which have no file."""
    headers: dict[str, str] = field(default_factory=dict)
    length: bool = True
    """Whether `Content-Length` is sent."""
    shift: list[int] = field(default_factory=list)
    """By how many bytes each of the first answers to a `Range` begins too late."""
    gate: threading.Event | None = None
    """Where the body stops after its first half until this is set."""


class Site:
    """Files by path, and a log of what was asked for and sent."""

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.requests: list[tuple[str, str | None]] = []
        """Path and `Range` of every request."""
        self.encodings: list[str | None] = []
        """`Accept-Encoding` of every request."""
        self.sent: list[int] = []
        """Bytes of the body that each request got."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def put(self, path: str, body: bytes, **faults) -> str:
        """Serve a file; returns its address."""
        self.files[path] = Served(body, **{"etag": f'"{hashlib.md5(body).hexdigest()}"', **faults})
        return self.address + path

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()

    def _handler(site):  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                served = site.files.get(self.path)
                site.requests.append((self.path, self.headers.get("Range")))
                site.encodings.append(self.headers.get("Accept-Encoding"))
                site.sent.append(0)
                if served is None:
                    return self.answer(404, {})
                if served.answers:
                    return self.answer(*served.answers.pop(0))
                status, start = self.extent(served)
                if status == 416:
                    return self.answer(416, {"Content-Range": f"bytes */{len(served.body)}"})
                return self.send(served, status, start, len(site.sent) - 1)

            def extent(self, served):
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                same = self.headers.get("If-Range") in (None, served.etag)
                if not asked or not served.ranges or not same:
                    return 200, 0
                start = int(asked[1]) + (served.shift.pop(0) if served.shift else 0)
                return (206, start) if start < len(served.body) else (416, start)

            def answer(self, status, headers):
                self.send_response(status)
                for name, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def send(self, served, status, start, request):
                body = served.body[start:]
                self.send_response(status)
                if served.length:
                    self.send_header("Content-Length", str(len(body)))
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{len(served.body) - 1}/{len(served.body)}")
                if served.etag:
                    self.send_header("ETag", served.etag)
                for name, value in served.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                cut = served.cuts.pop(0) if served.cuts else len(body)
                self.write(body[: min(cut, len(body) // 2)] if served.gate else body[:cut], request)
                if served.gate:
                    served.gate.wait(60)
                    self.write(body[len(body) // 2 : cut], request)
                if cut < len(body) or not served.length:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)

            def write(self, body, request):
                with contextlib.suppress(ConnectionError):  # who asked is gone
                    self.wfile.write(body)
                    self.wfile.flush()
                    site.sent[request] += len(body)

        return Handler
