"""`--rate`: of every task, and of one."""

import pytest

from utune_deploy.deploy.options import rates
from utune_deploy.merge.errors import UsageError


def test_a_number_is_of_every_task_and_a_name_of_one():
    assert rates(()) == {"rate": None, "rates": {}}
    assert rates(("100", "pets=2.5")) == {"rate": 100.0, "rates": {"pets": 2.5}}


@pytest.mark.parametrize(
    "texts", [("1", "2"), ("a=1", "a=2"), ("0",), ("fast",), ("a=-1",), ("=3",)]
)
def test_what_is_no_rate_is_refused(texts):
    with pytest.raises(UsageError, match=r"rate|setting"):
        rates(texts)
