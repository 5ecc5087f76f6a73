"""llama.engine.limits: numbers with which no engine could work. What is refused at the door: test_scheduler.py."""

from dataclasses import fields

import pytest

from llama.config import ConfigError
from llama.engine.limits import Limits

NAMES = [one.name for one in fields(Limits)]


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "8", None])
@pytest.mark.parametrize("name", NAMES)
def test_a_limit_that_is_no_positive_integer_is_refused_by_its_name(name, value):
    with pytest.raises(ConfigError) as refusal:
        Limits(**{"max_context": 64, name: value})
    assert str(refusal.value) == f"the limit {name} must be an integer of at least 1, not {value!r}"


def test_the_least_of_each_is_taken():
    assert Limits(*[1] * len(NAMES)).max_queued_requests == 1
