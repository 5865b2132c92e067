import dataclasses

import pytest
from cases import RAGGED, batch_of


@pytest.fixture
def ragged():
    """The small ragged batch and its scores, the privileged ones equal to the teacher's."""
    batch, scores, _ = batch_of(RAGGED)
    return batch, dataclasses.replace(scores, privileged_M=scores.teacher_M)
