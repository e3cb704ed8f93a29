"""A web server that sends parts of files, as object stores do, and counts what it sends."""
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


@dataclass
class Served:
    """What the server holds, and what it has sent."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    status: int = 200       # what is answered for every file, where it is no success
    bytes_sent: int = 0
    requests: int = 0


@contextmanager
def serve_ranges() -> Iterator[Served]:
    """A server on a free port of loopback until the block ends."""
    served = Served()
    handler = type("Handler", (_Handler,), {"served": served})
    with _Server(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):   # a client need not listen to the end
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    served: ClassVar[Served]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(send=True)

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def log_message(self, *words: object) -> None:
        pass

    def _answer(self, *, send: bool) -> None:
        content = self.served.files.get(self.path.partition("?")[0].lstrip("/"))
        if content is None or self.served.status != 200:
            self.send_response(404 if content is None else self.served.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")) if self.served.ranges else None
        first = 0 if not wanted else int(wanted[1]) if wanted[1] else max(len(content) - int(wanted[2]), 0)
        part = content[first:int(wanted[2]) + 1 if wanted and wanted[1] and wanted[2] else None]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        if self.served.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(content):x}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if send:
            self.wfile.write(part)
            self.served.bytes_sent += len(part)
            self.served.requests += 1
