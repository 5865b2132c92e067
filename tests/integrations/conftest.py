import pytest
from tiny import BUILTIN


@pytest.fixture(params=BUILTIN, ids=lambda env_id: env_id.split("/")[1].split("-")[0])
def env_id(request):
    return request.param


@pytest.fixture
def options(env_id):
    return dict(BUILTIN[env_id])
