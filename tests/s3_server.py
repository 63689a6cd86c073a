"""A real S3 server on loopback (moto's), and a proxy before it that fails as services do."""

from __future__ import annotations

import http.client
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

BUCKET = "bkt"
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "very-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class Faulty(ThreadingHTTPServer):
    """Hands requests on to the server at ``port``; a share ``faults`` of them gets a 500, a 503
    slow-down, or an answer that breaks off. Each answer comes ``delay`` seconds late.
    """

    daemon_threads = True

    def __init__(self, port: int, faults: float = 0.0, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.faults, self.delay = port, faults, 0.0
        self.count: Counter[str] = Counter()
        self.bytes = 0
        self._random, self._lock = Random(seed), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str | None:
        with self._lock:
            if self._random.random() >= self.faults:
                return None
            return self._random.choice(("500", "503", "cut", "cut before the answer"))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that the other side gave up are nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def log_message(self, *args: Any) -> None:
        pass

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault()
        time.sleep(self.server.delay)
        self.server.count[self.command] += 1
        if fault:
            self.server.count[fault] += 1
        if fault in ("500", "503"):
            self._answer(int(fault), [], SLOW_DOWN if fault == "503" else b"")
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection",)}
        link = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        link.request(self.command, self.path, body, headers)
        found = link.getresponse()
        data = found.read()
        self.server.bytes += len(data) + len(body)
        if fault == "cut before the answer":  # what was asked is done, and nobody hears of it
            self.close_connection = True
            return
        skip = ("connection", "transfer-encoding", "content-length", "server", "date")
        kept = [(k, v) for k, v in found.getheaders() if k.lower() not in skip]
        length = found.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(found.status, kept, data, cut=fault == "cut", length=length)
        link.close()

    def _answer(
        self,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        cut: bool = False,
        length: str | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _any


@contextmanager
def s3_server() -> Iterator[Faulty]:
    """An S3 server with the bucket ``BUCKET``; yields the proxy before it. The environment then
    names it.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    link = http.client.HTTPConnection("127.0.0.1", port)
    link.request("PUT", f"/{BUCKET}")
    assert link.getresponse().status == 200
    proxy = Faulty(port)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    before = {name: os.environ.get(name) for name in (*SETTINGS, "AWS_ENDPOINT_URL")}
    os.environ.update(SETTINGS, AWS_ENDPOINT_URL=proxy.url)
    try:
        yield proxy
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        proxy.shutdown()
        proxy.server_close()
        server.stop()
