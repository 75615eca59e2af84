"""A server whose connection can be cut, made silent and restored: a relay on a port of its own."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from types import TracebackType


class Relay:
    """Passes bytes between its own `port` and `target` while `mode` is "open".

    "refused": nobody listens, and connections that were open are reset. "silent": connections are taken, and nothing is answered.
    """

    def __init__(self, target: int) -> None:
        self.target, self.mode = target, "open"
        self._listener = self._listen(0)
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, mode: str) -> None:
        """Change the mode; connections that are under way end unless it is "open"."""
        before, self.mode = self.mode, mode
        if mode == "refused" and before != "refused":
            self._listener.close()
        elif before == "refused" and mode != "refused":
            self._listener = self._listen(self.port)
        if mode != "open":
            for each in list(self._open):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        self.set("refused")

    def _listen(self, port: int) -> socket.socket:
        found = socket.socket()
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(("127.0.0.1", port))
        found.listen(64)
        return found

    def _accept(self) -> None:
        while not self._closed.wait(0.01):
            try:
                ready = select.select([self._listener], [], [], 0.1)[0]
                client = self._listener.accept()[0] if ready else None
            except (OSError, ValueError):  # closed meanwhile
                continue
            if client is not None:
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            ends = [stack.enter_context(client)]
            self._open.add(client)
            stack.callback(self._open.discard, client)
            if self.mode != "open":
                while self.mode == "silent" and client.recv(1 << 16):
                    pass
                return
            ends.append(stack.enter_context(socket.create_connection(("127.0.0.1", self.target))))
            while True:
                for end in select.select(ends, [], [])[0]:
                    data = end.recv(1 << 16)
                    if not data:
                        return
                    # An answer that comes after the cut is lost: the server has what the client does not know of.
                    if self.mode != "open":
                        return
                    ends[1 - ends.index(end)].sendall(data)
