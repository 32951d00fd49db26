"""A real HTTP proxy that stands in front of a storage server and behaves badly, as asked, from a seed.

It also serves as the proxy that HTTP_PROXY and HTTPS_PROXY name, whatever host the requests are for.
"""

import contextlib
import http.client
import json
import os
import random
import re
import socket
import ssl
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

OPERATIONS = ("get", "list", "create", "other")


class Request(NamedTuple):
    """What was asked (see `operation`), the path with its query, and the fault it met, or None."""

    operation: str
    path: str
    fault: str | None


def operation(method, path):
    """Tell which permission a request needs: "get", "list", "create", or "other" (an overwriting upload, too)."""
    parts = urlsplit(path)
    if method == "GET" and re.fullmatch(r"/storage/v1/b/[^/]+/o", parts.path):
        return "list"
    if method == "GET" and re.fullmatch(r"(/download)?/storage/v1/b/[^/]+/o/[^/]+", parts.path):
        return "get"
    guarded = parse_qs(parts.query).get("ifGenerationMatch") == ["0"]
    if method == "POST" and guarded and re.fullmatch(r"/upload/storage/v1/b/[^/]+/o", parts.path):
        return "create"
    return "other"


class ChaosProxy:
    """A proxy at `url`. Its settings may be changed while it runs; `requests` is its log.

    server : address of the storage server, "http://host:port"
    rate : share of the requests that meet a fault, in [0, 1], drawn from the seed
    faults : "reset" (the connection, before the request reaches the server), "lost" (the connection is reset
        once the server has done its work), "delay" (for `delay` seconds), "403" (as for too many requests), "429",
        "500", "503", "cut" (half a body), "wrong" (a whole body of the right length, of other bytes)
    latency : of each answer, in seconds
    permissions : operations that are not refused
    token : the access token without which a request is refused with 401; None: any will do
    play : gets method, path and headers of a request; returns the answer, as status and bytes, or None for the server's
    rewrite : gets the operation and the JSON of an answer of the server, and returns the JSON that is sent
    certificate : a PEM file with certificate and key, for a proxy that speaks TLS
    """

    faults = ("reset", "lost", "delay", "403", "429", "500", "503", "cut", "wrong")

    def __init__(self, server, rate=0.0, seed=0, delay=0.5, permissions=OPERATIONS, certificate=None):
        self.server, self.rate, self.delay, self.latency = server, rate, delay, 0.0
        self.permissions, self.token = permissions, None
        self.play, self.rewrite = lambda *request: None, lambda operation, answer: answer
        self.requests = []
        self.connections = set()
        self._random = random.Random(seed)
        self._listener = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self._listener.server_port}"
        if certificate:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate)
            self._listener.socket = context.wrap_socket(self._listener.socket, server_side=True)

    def __enter__(self):
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown()
        self._listener.server_close()

    def count(self, *operations):
        return sum(request.operation in operations for request in list(self.requests))

    def settle(self):
        """Wait until all clients have gone, and what they asked for is done and logged."""
        while self.connections:
            time.sleep(0.01)

    def draw(self, method, path):
        """Log a request and choose its fault."""
        fault = self._random.choice(self.faults) if self._random.random() < self.rate else None
        self.requests.append(Request(operation(method, path), path, fault))
        return fault


class _Listener(ThreadingHTTPServer):
    request_queue_size = 256

    def handle_error(self, request, client_address):
        """Connections break here all the time: no traceback for it."""


class _Handler(BaseHTTPRequestHandler):
    proxy: ChaosProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    upstream = None

    def log_message(self, *_):
        pass

    def setup(self):
        self.proxy.connections.add(self)
        super().setup()

    def finish(self):
        if self.upstream:
            self.upstream.close()
        with contextlib.suppress(OSError, ValueError):
            super().finish()
        self.proxy.connections.discard(self)

    def _handle(self):
        proxy = self.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "://" in self.path:  # to a proxy, the whole address is named
            self.path = urlsplit(self.path)._replace(scheme="", netloc="").geturl()
        fault = proxy.draw(self.command, self.path)
        time.sleep(proxy.latency)
        if fault == "reset":
            return self._reset()
        if operation(self.command, self.path) not in proxy.permissions:
            return self._refuse(403, "someone@example.com does not have access to the Google Cloud Storage object.")
        if proxy.token and self.headers.get("Authorization") != f"Bearer {proxy.token}":
            return self._refuse(401, "Invalid Credentials")
        if fault in ("403", "429", "500", "503"):
            return self._refuse(int(fault), "User Rate Limit Exceeded")
        if played := proxy.play(self.command, self.path, self.headers):
            return self._answer(*played)
        if fault == "delay":
            time.sleep(proxy.delay)

        self.upstream = self.upstream or http.client.HTTPConnection(urlsplit(proxy.server).netloc)
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "connection")}
        self.upstream.request(self.command, self.path, body, headers)
        answer = self.upstream.getresponse()
        content, is_json = answer.read(), answer.getheader("Content-Type", "").startswith("application/json")
        if fault == "lost":
            return self._reset()
        if fault == "wrong":
            content = b" " * len(content) if is_json else bytes(byte ^ 1 for byte in content)
        elif is_json:
            content = json.dumps(proxy.rewrite(operation(self.command, self.path), json.loads(content))).encode()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        if fault == "cut":
            self._reset()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _handle

    def do_CONNECT(self):
        """Let bytes through, both ways, until one side has no more."""
        self.proxy.requests.append(Request("connect", self.path, None))
        if played := self.proxy.play("CONNECT", self.path, self.headers):
            return self._answer(*played)
        with socket.create_connection(tuple(urlsplit(self.proxy.server).netloc.split(":"))) as there:
            self.send_response(200)
            self.end_headers()
            self.wfile.flush()
            back = threading.Thread(target=_pipe, args=(there, self.connection), daemon=True)
            back.start()
            _pipe(self.connection, there)
            back.join()
        self.close_connection = True

    def _refuse(self, status, message):
        self._answer(status, json.dumps({"error": {"code": status, "message": message}}).encode())

    def _answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _reset(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # at once, with RST: the handler's files still refer to the socket


def _pipe(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
