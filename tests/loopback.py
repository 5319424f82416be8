"""Servers on loopback for tests of storage: S3, and one before it that fails as networks do."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = str
"""`refuse` (503), `cut` (in the middle of the answer), `lose` (the answer, after the request was served), `stall`."""


class Faulty(ThreadingHTTPServer):
    """Hands requests on to another server; some of them, drawn by lot, fail."""

    daemon_threads = True

    def __init__(self, port: int, share: float, seed: int, stall: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.share, self.stall = port, share, stall
        self.random, self.lock = random.Random(seed), threading.Lock()
        self.counts: Counter[str] = Counter()

    def draw(self) -> Fault | None:
        with self.lock:
            fault = None
            if self.random.random() < self.share:
                fault = self.random.choice(["refuse", "cut", "lose", "stall"])
            self.counts[fault or "served"] += 1
        return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def _handle(self) -> None:
        body = self._body()
        fault = self.server.draw()
        if fault == "stall":
            time.sleep(self.server.stall)
            self.close_connection = True
            return
        if fault == "refuse":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status, headers, content = self._ask(body)
        if fault == "lose":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(content)))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content[:len(content) // 2] if fault == "cut" else content)
        self.close_connection = fault == "cut"

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        found = answer.status, answer.getheaders(), answer.read()
        connection.close()
        return found

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextmanager
def faulty(port: int, share: float = 0.1, seed: int = 0, stall: float = 4.0) -> Iterator[Faulty]:
    """A server on a port of its own before the one on `port`."""
    server = Faulty(port, share, seed, stall)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3() -> Iterator[int]:
    """Moto's S3 server with an empty bucket, `recap`; its port. In one process, all of them hold the same buckets."""
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        for method, path in (("POST", "/moto-api/reset"), ("PUT", "/recap")):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request(method, path)
            assert connection.getresponse().status == 200
            connection.close()
        yield port
    finally:
        server.stop()
