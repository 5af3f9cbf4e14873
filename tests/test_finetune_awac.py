"""algorithms/finetune/awac.py has the learner of offline/awac.py, word for word: the oracle tests of
tests/test_awac.py are made of it here too. What it does after the switch is in tests/test_finetune.py.
"""

import pytest
import test_awac
from conftest import load_script
from oracles import assert_compiled_is_eager
from test_awac import (  # noqa: F401
    test_a_truncation_bootstraps_from_its_last_observation,
    test_actor_loss,
    test_acts_by_the_clipped_mean_in_the_environments_units,
    test_an_optimiser_moves_its_own_network_only,
    test_critic_loss,
    test_form_and_numbers_are_corls,
    test_log_deviation_is_bounded,
    test_samples_are_normal_and_clipped,
    test_updates_critic_then_actor_then_target,
    test_weights_of_the_facts,
)

awac = load_script("finetune/awac.py")


@pytest.fixture(autouse=True)
def finetuned(monkeypatch):
    """From now on the imported tests test this script."""
    monkeypatch.setattr(test_awac, "awac", awac)


def test_the_imported_tests_test_this_script():
    assert type(test_awac.make()) is awac.AWAC


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    assert_compiled_is_eager(awac, [test_awac.make(tau=0.1), test_awac.make(tau=0.1)], batch)
