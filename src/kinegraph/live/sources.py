"""Where lines come from: a file, standard input, or those who connect to a TCP or Unix socket. All with limits."""

from __future__ import annotations

import ipaddress
import os
import select
import selectors
import socket
import stat
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from kinegraph.errors import Problem, UserError
from kinegraph.live.frames import MAX_LINE_BYTES, Fault, LineBuffer
from kinegraph.remote import fetch

READ_BYTES = 64 * 1024
MAX_CONNECTIONS = 16
EXPECTED_SOURCE = "a file of JSON lines, -, tcp://127.0.0.1:PORT or unix:///PATH"


class Batch(NamedTuple):
    """Lines of one sender; `first`: the number of the first of them, from 1."""

    name: str
    first: int
    lines: list[bytes]

    def locate(self, place: int) -> str:
        return f"{self.name}, line {self.first + place}"


class Source(Protocol):
    """`is_live`: it may wait for what is yet to happen, so that time passes while nothing comes."""

    is_live: bool
    faults: list[Fault]
    """What was left out; whoever reads the source takes them."""

    def read(self, timeout_s: float) -> list[Batch] | None:
        """What has come, after at most timeout_s; None at the end."""
        ...

    def close(self) -> None: ...


class _Sender:
    """The lines of one sender, numbered."""

    def __init__(self, name: str, faults: list[Fault]) -> None:
        self.name = name
        self.faults = faults
        self.buffer = LineBuffer()
        self.num_lines = 0

    def take(self, data: bytes) -> list[Batch]:
        """The batch of the lines that end in `data`, if there are any; b"" ends the last line."""
        skipped = self.buffer.num_skipped
        lines = self.buffer.add(data) if data else self.buffer.close()
        if self.buffer.num_skipped > skipped:
            where = f"{self.name}, line {self.num_lines + 1} or later"
            self.faults.append(Fault("too_long", where, "a longer line", f"at most {MAX_LINE_BYTES} bytes in a line"))
        batch = Batch(self.name, self.num_lines + 1, lines)
        self.num_lines += len(lines)
        return [batch] if lines else []


class DescriptorSource:
    """A file or standard input."""

    def __init__(self, descriptor: int, name: str, is_live: bool) -> None:
        self.descriptor = descriptor
        self.is_live = is_live
        self.faults: list[Fault] = []
        self.sender = _Sender(name, self.faults)
        self.is_over = False

    def read(self, timeout_s: float) -> list[Batch] | None:
        """See `Source`."""
        if self.is_over:
            return None
        if self.is_live and not select.select([self.descriptor], [], [], timeout_s)[0]:
            return []
        data = os.read(self.descriptor, READ_BYTES)
        self.is_over = not data
        return self.sender.take(data)

    def close(self) -> None:
        if self.descriptor != 0:
            os.close(self.descriptor)


class SocketSource:
    """Everybody who connects to a listening socket, MAX_CONNECTIONS at a time. It never ends by itself."""

    is_live = True

    def __init__(self, listener: socket.socket, address: str, path: Path | None = None) -> None:
        self.listener = listener
        self.address = address
        self.path = path
        self.faults: list[Fault] = []
        self.num_accepted = 0
        self.senders: dict[socket.socket, _Sender] = {}
        listener.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)

    def read(self, timeout_s: float) -> list[Batch] | None:
        """See `Source`. At most READ_BYTES of each connection, so that none keeps the others waiting."""
        batches: list[Batch] = []
        for key, _ in self.selector.select(timeout_s):
            if key.fileobj is self.listener:
                self._accept()
            else:
                batches += self._receive(key.fileobj)  # type: ignore[arg-type]
        return batches

    def close(self) -> None:
        for connection in [*self.senders, self.listener]:
            connection.close()
        self.selector.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:  # gone again before it was looked at
            return
        if len(self.senders) >= MAX_CONNECTIONS:
            connection.close()
            expected = f"at most {MAX_CONNECTIONS} at a time"
            self.faults.append(Fault("too_many_connections", self.address, "one more connection", expected))
            return
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            # A sender that vanished without a word must not keep its place for ever
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.num_accepted += 1
        self.senders[connection] = _Sender(f"connection {self.num_accepted}", self.faults)
        self.selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> list[Batch]:
        try:
            data = connection.recv(READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:  # reset by the other side
            data = b""
        batches = self.senders[connection].take(data)
        if not data:
            self.selector.unregister(connection)
            connection.close()
            del self.senders[connection]
        return batches


def open_source(location: str, allows_remote: bool = False) -> DescriptorSource | SocketSource:
    """A path or URI of a file, `-`, tcp://HOST:PORT or unix:///PATH (both listen).

    Raises UserError for what cannot be opened, and for a TCP address that other machines reach unless `allows_remote`.
    """
    if location == "-":
        return DescriptorSource(0, "stdin", is_live=True)
    if location.startswith("tcp://"):
        return _listen_tcp(location, allows_remote)
    if location.startswith("unix://"):
        return _listen_unix(location)
    path = fetch(location)
    if not path.exists() or not path.is_file():
        got = "no such file" if not path.exists() else "a folder" if path.is_dir() else "no ordinary file"
        hint = "A pipe goes to standard input: kinegraph live -" if got == "no ordinary file" else "Check the path."
        raise UserError(Problem(f"source {location}", got, EXPECTED_SOURCE, hint))
    try:
        return DescriptorSource(os.open(path, os.O_RDONLY | os.O_CLOEXEC), location, is_live=False)
    except OSError as error:
        raise UserError(Problem(f"source {location}", str(error.strerror), "a file that can be read")) from None


def _listen_tcp(location: str, allows_remote: bool) -> SocketSource:
    try:
        parts = urlsplit(location)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.path or parts.query or parts.username:
        raise UserError(Problem(f"source {location}", "no HOST:PORT", "tcp://127.0.0.1:PORT, such as port 5000"))
    if not allows_remote and not _is_loopback(host):
        hint = "Anybody who reaches this address can send frames: --allow-remote if that is wanted."
        raise UserError(Problem(f"source {location}", "an address for other machines", "a loopback address", hint))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise UserError(
            Problem(f"source {location}", error.strerror or str(error), "an address that is free")
        ) from None
    chosen = listener.getsockname()
    shown = f"[{chosen[0]}]" if family == socket.AF_INET6 else chosen[0]
    return SocketSource(listener, f"tcp://{shown}:{chosen[1]}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen_unix(location: str) -> SocketSource:
    path = Path(location.removeprefix("unix://"))
    _remove_dead_socket(path, location)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)  # for its owner only, from the first moment
    try:
        listener.bind(str(path))
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        got = error.strerror or str(error)
        raise UserError(Problem(f"source {location}", got, "the path of a new socket, unix:///PATH")) from None
    finally:
        os.umask(previous)
    return SocketSource(listener, location, path)


def _remove_dead_socket(path: Path, location: str) -> None:
    """What a killed process left; a socket that somebody listens to, or any other file, is left alone."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UserError(Problem(f"source {location}", "a file that is there already", "the path of a new socket"))
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError:
            return
        else:
            raise UserError(Problem(f"source {location}", "a socket in use", "the path of a new socket"))
