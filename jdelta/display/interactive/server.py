"""A web server that shows one page and takes one answer.

It is for one person at one machine. Every request has to carry the link's token; `Host` and `Origin` have to be those
of a page that this server gave (against DNS rebinding and posts from other sites); answers come by POST.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import ipaddress
import json
import os
import queue
import re
import secrets
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

FIRST_PORT = 8888
TRIED_PORTS = 100

TOKEN_HEADER = "X-Jdelta-Token"


class Refused(Exception):
    """An answer that is not taken; the text says why."""


@dataclasses.dataclass
class _Submission:
    """One answer on its way from a page to the main thread, and back."""

    value: Any
    status: int = 503
    reply: dict[str, Any] = dataclasses.field(default_factory=lambda: {"error": "Python stopped waiting."})
    done: threading.Event = dataclasses.field(default_factory=threading.Event)

    def answer(self, status: int, **reply: Any) -> None:
        """Says what became of it."""
        self.status, self.reply = status, reply
        self.done.set()


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves until one answer was taken.

        with Server(page, "127.0.0.1", True) as server:
            print(server.url)
            taken = server.wait(take)

    Args:
      page: from a nonce to the HTML document.
      host: the address to listen at.
      port: the port; `True` for the first free one from 8888 on.
      limit: the longest body in bytes.
      trusted: ends of other host names that the page may be shown under, such as a notebook's proxy.
      framed: what may show the page in a frame, as `frame-ancestors` has it.

    Raises:
      OSError: the port is in use, or the address is not this machine's.
      TypeError, ValueError: `port` is no port.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # on Windows it would let two servers share a port
    request_queue_size = 32

    def __init__(
        self,
        page: Callable[[str], str],
        host: str,
        port: bool | int,
        limit: int = 1 << 16,
        trusted: tuple[str, ...] = (),
        framed: str = "'none'",
    ):
        self.page, self.limit, self.trusted, self.framed = page, limit, trusted, framed
        self.host, self.token = host, secrets.token_urlsafe(24)
        self.over = threading.Event()  # an answer was taken, or nobody waits any more
        self.outcome: dict[str, Any] = {"state": "stopped"}
        self.submissions: queue.Queue[_Submission] = queue.Queue()
        self._busy = 0
        self._idle = threading.Condition()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._bind(host, port)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def _bind(self, host: str, port: bool | int) -> None:
        if port is not True and (isinstance(port, bool) or not isinstance(port, int)):
            raise TypeError(f"the port of the page is a number or True, got {port!r}.")
        if port is not True and not 1 <= port <= 65535:
            raise ValueError(f"the port of the page is from 1 to 65535, got {port}.")
        ports = [*range(FIRST_PORT, FIRST_PORT + TRIED_PORTS), 0] if port is True else [port]
        for number in ports:
            try:
                super().__init__((host, number), _Handler)
                return
            except PermissionError as error:
                raise PermissionError(
                    error.errno, f"port {number} at {host} is not allowed: {error.strerror}."
                ) from None
            except OSError as error:
                if _taken(host, number):
                    problem: OSError = OSError(
                        error.errno, f"port {number} at {host} is in use. Give another one, or True for a free one."
                    )
                else:
                    raise OSError(error.errno, f"cannot listen at {host!r}: {error.strerror or error}.") from None
        raise problem from None

    def server_bind(self) -> None:
        """Binds without asking a name server who this is."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def url(self) -> str:
        """The link, with the token."""
        host = socket.gethostname() if self.host in ("", "0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/?token={self.token}"

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the server; the port is then free. Pages that wait are told."""
        self.over.set()
        self._refuse_all()
        with self._idle:
            self._idle.wait_for(lambda: self._busy == 0, timeout=1)
        self.shutdown()
        self.server_close()

    def wait(self, take: Callable[[Any], Any]) -> Any:
        """Gives what pages send to `take`, in this thread, until it takes one, and returns what `take` returned.

        Args:
          take: raises `Refused`, `TypeError` or `ValueError` for an answer that is not taken; the page shows the text.
        """
        while True:
            try:
                submission = self.submissions.get(timeout=0.2)
            except queue.Empty:
                continue
            try:
                taken = take(submission.value)
            except (Refused, TypeError, ValueError) as error:
                submission.answer(422, error=str(error))
            except BaseException:
                submission.answer(500, error="Python stopped with an error.")
                raise
            else:
                self.outcome = {"state": "chosen", "chosen": taken}
                submission.answer(200, **self.outcome)
                self.over.set()
                return taken

    def offer(self, value: Any) -> tuple[int, dict[str, Any]]:
        """Hands an answer to the main thread and waits for what becomes of it."""
        submission = _Submission(value)
        self.submissions.put(submission)
        if self.over.is_set():
            self._refuse_all()
        submission.done.wait()
        return submission.status, submission.reply

    def _refuse_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                submission = self.submissions.get_nowait()
                if self.outcome["state"] == "chosen":
                    submission.answer(409, error="A selection was already made.", **self.outcome)
                else:
                    submission.answer(503, error="Python stopped waiting.", **self.outcome)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While this lasts, the server is not ended (for a second at most)."""
        with self._idle:
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that is closed in the middle of an answer is nothing to tell the user."""

    @property
    def private(self) -> bool:
        """Whether only this machine can reach it."""
        return _loopback(self.host)

    def knows(self, host: str) -> bool:
        """Whether a `Host` header names this server. An address cannot be a foreign site's name."""
        parts = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d+)?", host.lower())
        if parts is None:
            return False
        name = parts[1] or parts[2]
        if name == "localhost" or name == self.host or name.endswith(self.trusted or ("\0",)):
            return True
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(name).is_loopback or not self.private
        return not self.private and name in (socket.gethostname().lower(), socket.getfqdn().lower())


class _Handler(http.server.BaseHTTPRequestHandler):
    """`GET /` is the page, `POST /submit` an answer, and `POST /wait` ends when the server does."""

    server: Server
    timeout = 30
    server_version, sys_version = "jdelta", ""
    default_request_version = "HTTP/1.0"  # of a line that says none: the answer then has a status too
    raw_requestline: bytes
    url: SplitResult
    origin: SplitResult | None

    def parse_request(self) -> bool:
        """Whether the request can be read; what is wrong is answered."""
        if not str(self.raw_requestline, "iso-8859-1").split():
            self.requestline, self.command, self.request_version = "", "", self.default_request_version
            self._error(400, "the request's first line is empty.")
            return False
        if not super().parse_request():
            return False
        origin = self.headers.get("Origin")
        try:
            self.url, self.origin = urlsplit(self.path), None if origin is None else urlsplit(origin)
        except ValueError as error:
            self._error(400, f"the request has an address that cannot be read: {error}.")
            return False
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server answers of itself, as all other answers are."""
        self.close_connection = True
        self._error(int(code), message or http.HTTPStatus(code).phrase)

    def do_GET(self) -> None:
        with self.server.busy():
            if not self._allowed(parse_qs(self.url.query).get("token", [""])[0]):
                return
            if self._route() != "":
                self._error(405, f"GET /{self._route()}: answers come by POST.", Allow="POST")
                return
            nonce = secrets.token_urlsafe(16)
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
                f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors {self.server.framed}"
            )
            body = self.server.page(nonce).encode()
            self._send(200, "text/html; charset=utf-8", body, {"Content-Security-Policy": policy})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        route = self._route()
        if route == "wait":
            if self._allowed(self.headers.get(TOKEN_HEADER, ""), post=True):
                self.server.over.wait(25)
                with self.server.busy():
                    state = self.server.outcome if self.server.over.is_set() else {"state": "open"}
                    self._json(200, state)
            return
        with self.server.busy():
            if not self._allowed(self.headers.get(TOKEN_HEADER, ""), post=True):
                return
            if route != "submit":
                self._error(404, f"there is nothing at /{route}.")
                return
            found, value = self._body()
            if found:
                self._json(*self.server.offer(value))

    def _route(self) -> str:
        return self.url.path.rpartition("/")[2]

    def _allowed(self, token: str, post: bool = False) -> bool:
        """Checks who asks; what is wrong is answered."""
        host, origin = self.headers.get("Host", ""), self.origin
        if not self.server.knows(host):
            self._error(403, f"the host {host!r} is not this server's name. Open the link that was printed.")
        elif (origin is not None or post) and not (origin is not None and self._own(origin, host)):
            self._error(
                403, f"a page of {self.headers.get('Origin')!r} cannot answer here. Open the link that was printed."
            )
        elif not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._error(403, "the token is missing or wrong. Open the whole link that was printed.")
        else:
            return True
        return False

    def _own(self, origin: SplitResult, host: str) -> bool:
        if origin.netloc.lower() == host.lower() and origin.scheme in ("http", "https"):
            return True
        return bool(self.server.trusted) and (origin.hostname or "").endswith(self.server.trusted)

    def _body(self) -> tuple[bool, Any]:
        """Whether there is one that can be read, and what it says; what is wrong is answered."""
        length, kind = self.headers.get("Content-Length", ""), self.headers.get_content_type()
        if not (length.isascii() and length.isdigit()):
            self._error(411, "the answer needs a Content-Length.")
        elif len(length) > 12 or int(length) > self.server.limit:
            if len(length) < 7:
                self.rfile.read(int(length))  # so that the client gets to reading the answer
            self._error(413, f"the answer has {length} bytes; {self.server.limit} are the most that the page can send.")
        elif kind != "application/json":
            self._error(415, f"the answer is application/json, got {kind}.")
        else:
            try:
                return True, json.loads(self.rfile.read(int(length)))
            except (ValueError, RecursionError) as error:
                self._error(400, f"the answer is not JSON: {error}.")
            except TimeoutError:
                self._error(408, f"the answer was not sent whole within {self.timeout} seconds.")
        return False, None

    def _json(self, status: int, reply: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._send(status, "application/json", json.dumps(reply).encode(), headers or {})

    def _error(self, status: int, message: str, **headers: str) -> None:
        self._json(status, {"error": message[:1].upper() + message[1:]}, headers)

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
        always = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
        }
        self.send_response(status)
        for key, value in {**always, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """The terminal shows the link and the selection, nothing else."""


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _taken(host: str, port: int) -> bool:
    """Whether the address is this machine's, so that only the port can be the problem."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return port != 0
