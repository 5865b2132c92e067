"""The toy worlds that the server's tests offer, and a server in a thread."""

import contextlib
import threading
import time

import gymnasium as gym
import pytest
from toy import ToyEnv

from atod_envs.serve.sessions import Limits, Offer, Sessions


class Gate:
    """Holds back a client that says ``wait``, until it is opened or ``enough`` are waiting at the same time."""

    def __init__(self):
        self.enough, self.waiting = None, 0
        self._changed = threading.Condition()
        self._open = False

    def enter(self):
        with self._changed:
            self.waiting += 1
            self._open |= self.waiting == self.enough
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._open, 120):
                raise RuntimeError("the gate was not opened")

    def open(self):
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def until_waiting(self, number):
        with self._changed:
            assert self._changed.wait_for(lambda: self.waiting >= number, 120), "no client came to the gate"


class OddEnv(ToyEnv):
    """The toy world with actions that go wrong: it waits at a gate, fails, or says what JSON cannot hold."""

    env_key = "odd"
    gate = Gate()

    def __init__(self, wait=False, **options):
        super().__init__(**options)
        if wait:
            OddEnv.gate.enter()

    def _act(self, action):
        if action == "wait":
            OddEnv.gate.enter()
        if action == "fail":
            raise RuntimeError("secret: /etc/passwd")
        if action == "time out":
            raise TimeoutError("a service of its own")
        frame = super()._act("nothing" if action == "wait" else action)
        extra = {"kind": "fruit", "seen": ["a", ("b", [1])], "nested": {"deep": (1, 2.5, None)}}
        if action == "object":
            extra["thing"] = object()
        return type(frame)(f"{frame.observation} {action}", frame.admissible, frame.reward, extra=extra)


class BlockingEnv(OddEnv):
    env_key = "blocking"
    blocking = True


for name, kind in (("odd/Odd-v0", OddEnv), ("odd/Blocking-v0", BlockingEnv)):
    if name not in gym.registry:
        gym.register(name, entry_point=kind, disable_env_checker=True)

TOY_OFFERS = [Offer("odd/Odd-v0", ("train", "valid")), Offer("odd/Blocking-v0", ("train",))]


@contextlib.contextmanager
def running(offers, *, token="", port=0, clock=time.monotonic, **limits):
    """A server in a thread; gives its address and its sessions."""
    pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")
    from atod_envs.serve.app import listen, make_server

    sessions = Sessions(list(offers), Limits(**limits), clock)
    server = make_server(sessions, token=token)
    listening = listen("127.0.0.1", port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", sessions
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"
