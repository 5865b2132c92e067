import pytest
from servers import TOY_OFFERS, Gate, OddEnv, running


@pytest.fixture(scope="module")
def toy_server():
    with running(TOY_OFFERS) as (url, _):
        yield url


@pytest.fixture
def gate(monkeypatch):
    """Where the toy worlds of a test wait; open when the test has ended."""
    made = Gate()
    monkeypatch.setattr(OddEnv, "gate", made)
    yield made
    made.open()


@pytest.fixture(params=["http", "ws"])
def kind(request):
    if request.param == "ws":
        pytest.importorskip("websockets", reason="websockets is not installed (extra 'serve')")
    return request.param
