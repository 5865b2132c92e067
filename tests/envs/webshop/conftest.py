"""A cache of its own for the tests, and the real catalogue."""

import gzip
import json

import pytest

from atod_envs.webshop.catalogue.cache import open_store


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Stores are built in a temporary folder, never in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("WEBSHOP_DATA", raising=False)
        yield


@pytest.fixture(scope="session")
def webshop_data(realdata):
    return realdata / "webshop"


@pytest.fixture(scope="session")
def real_store(webshop_data, cache):
    return open_store(webshop_data)


@pytest.fixture(scope="session")
def read_golden(webshop_data):
    def read(name):
        with gzip.open(webshop_data / name, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    return read
