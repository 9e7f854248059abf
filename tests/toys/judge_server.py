"""A local server that answers as OpenAI-compatible ones do, or does not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeServer:
    """Keeps every request; `reply(request, number)` gives (status, text), or a number of seconds to hang."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Any], models: Any = ("judge-1",)) -> None:
        self.reply, self.models = reply, models
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.address = ""


def said(text: str) -> tuple[int, str]:
    """A completion."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@contextmanager
def serving(reply: Any = None, models: Any = ("judge-1",)) -> Iterator[FakeServer]:
    fake = FakeServer(reply or (lambda request, number: said('{"score": 0.5}')), models)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, found: Any) -> None:
            if isinstance(found, int | float):
                time.sleep(found)
                found = said('{"score": 1}')
            status, text, *headers = found
            try:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:  # whoever asked has gone
                pass

        def do_GET(self) -> None:
            fake.keys.append(self.headers.get("Authorization"))
            if isinstance(fake.models, int):
                self.answer((fake.models, "no list"))
            else:
                self.answer((200, json.dumps({"data": [{"id": name} for name in fake.models]})))

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                number = len(fake.requests)
                fake.requests.append(request)
                fake.keys.append(self.headers.get("Authorization"))
            self.answer(fake.reply(request, number))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
