"""The toy world's student and teacher, loaded once for the tests of a module."""

import pytest

from agents.models import load_model


@pytest.fixture(scope="module")
def student(models):
    return load_model(str(models["student"]), "student")


@pytest.fixture(scope="module")
def teacher(models):
    return load_model(str(models["teacher"]), "teacher")
