"""An S3 server on loopback, for tests of storage."""

from __future__ import annotations

import logging
import random
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest


@contextmanager
def s3_server(bucket: str) -> Iterator[Any]:
    """Yield moto's server with an empty `bucket`. Its `stop` and `start` break and restore the network.

    The libraries and processes started in the block use it, through the variables of the environment that S3 has.
    """
    moto = pytest.importorskip("moto.server", reason="needs pip install -e '.[dev]' on Python 3.11")
    s3fs = pytest.importorskip("s3fs", reason="needs pip install -e '.[s3]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    server._port = port  # the same one after a restart
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("NO_PROXY", host)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(bucket)
        try:
            yield server
        finally:
            urllib.request.urlopen(
                urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
            ).close()
            server.stop()
            s3fs.S3FileSystem.clear_instance_cache()


class BreakingProxy:
    """Forwards connections to a server, and resets each after a random number of bytes in either direction."""

    def __init__(self, port: int, bytes_until_reset: tuple[int, int], seed: int = 0) -> None:
        self.server_port, self.bytes_until_reset = port, bytes_until_reset
        self.resets = 0
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # until it is closed
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.server_port))
                budget = [self._random.randint(*self.bytes_until_reset)]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(source, target, client, budget), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, client: socket.socket, budget: list[int]) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                budget[0] -= len(data)
                if budget[0] < 0:
                    self.resets += 1
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.close()
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
