"""HTTP by hand: a server that answers with given bytes, a request as bytes, and each of our servers on a free port."""

import contextlib
import http.client
import json
import socket
import threading
import time
from types import SimpleNamespace

from servers import TOY_OFFERS, running


class Scripted:
    """Answers requests with the given bytes in turn, the last for ever; ``None`` closes without a word.

    Attributes:
        requests: heads and bodies that came, as text.
        connections: how many there were.
    """

    def __init__(self, *answers, close=True):
        self.answers, self.close = answers, close
        self.requests, self.connections = [], 0
        self._open, self._threads = [], []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._start(self._serve)

    def _start(self, work, *given):
        self._threads.append(threading.Thread(target=work, args=given, daemon=True))
        self._threads[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        _shut(self._listening)
        self._join(self._threads[0])  # no connection is accepted any more
        self._listening.close()
        for connection in self._open:
            _shut(connection)
        for thread in self._threads[1:]:
            self._join(thread)

    def _join(self, thread):
        thread.join(60)
        assert not thread.is_alive(), "a thread runs on, and would take the processor from every later test"

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self.connections += 1
                self._open.append(connection)
                self._start(self._converse, connection)

    def _converse(self, connection):
        with connection, contextlib.suppress(OSError):
            connection.settimeout(120)
            stream = connection.makefile("rb")
            while head := _head(stream):
                length = next(
                    (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
                )
                self.requests.append((head + stream.read(length)).decode("latin-1"))
                answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
                if answer is None:
                    return
                connection.sendall(answer)
                if self.close:
                    return


def _shut(one):
    """End what a thread waits for at a socket."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


def _head(stream):
    """The lines before the empty one; nothing where the other side has closed."""
    head = b""
    while (line := stream.readline()) != b"\r\n":
        if not line:
            return b""
        head += line
    return head


def reply(body=b"{}", status="200 OK", **headers):
    """An answer's bytes."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def send(port, *parts, wait=60):
    """Send bytes as they are; gives all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                answer += part
    return answer


def post(port, path, body, **headers):
    """Post a body on a connection of its own: status and answer."""
    lines = [f"POST {path} HTTP/1.1", "Connection: close", f"Content-Length: {len(body)}"]
    headers = {"Host": f"127.0.0.1:{port}", **headers}
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return read(send(port, "\r\n".join([*lines, "", ""]).encode() + body))


def get(port, path, **headers):
    """Get a page on a connection of its own: status and answer."""
    headers = {"Host": f"127.0.0.1:{port}", **headers}
    lines = [f"GET {path} HTTP/1.1", "Connection: close", *(f"{name}: {value}" for name, value in headers.items())]
    return read(send(port, "\r\n".join([*lines, "", ""]).encode()))


def read(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def head_of(answer):
    return answer.partition(b"\r\n\r\n")[0].decode().lower()


@contextlib.contextmanager
def serving(server):
    """A server of ours in a thread; gives its port."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


def teacher():
    """The teacher's server around a model that is never reached: what is tested is refused before."""
    from atod_algos.teachers.server import ServeOptions, TeacherServer

    model = SimpleNamespace(
        get_input_embeddings=lambda: SimpleNamespace(num_embeddings=100),
        config=SimpleNamespace(max_position_embeddings=64),
    )
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [ord(letter) for letter in text])
    return TeacherServer(SimpleNamespace(name="m", model=model, tokenizer=tokenizer), ServeOptions("x", port=0))


@contextlib.contextmanager
def any_server(name):
    """One of the project's servers; gives its port."""
    if name == "environments":
        with running(TOY_OFFERS) as (url, _):
            yield int(url.rsplit(":", 1)[1])
        return
    if name == "search":
        from atod_envs.retrieval.protocol import Passage
        from atod_envs.searchqa.serve import RetrievalServer

        found = SimpleNamespace(retrieve=lambda queries, k: [[Passage(q, q, 1.0)] for q in queries])
        server = RetrievalServer(found)
    elif name == "shop":
        from atod_envs.webshop.serve import ShopServer

        server = ShopServer(("127.0.0.1", 0), {"split": "test", "goals": "synthetic"}, None)
    else:
        server = teacher()
    with serving(server) as port:
        yield port


def post_call(url, call, body, **headers):
    """A call to a server of environments: status and answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", f"/v1/{call}", data, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text.startswith(b"{") else text


def connected(port, receive=1 << 20):
    """A connection that takes so many bytes before it is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", port))
    return connection


def eventually(condition, what):
    """Wait until something holds; ``what`` says what is wrong where it never does."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
