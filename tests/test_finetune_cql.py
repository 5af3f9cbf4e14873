"""algorithms/finetune/cql.py has the learner of offline/cql.py, word for word: the oracle tests of
tests/test_cql.py are made of it here too. What it does after the switch is in tests/test_finetune.py.
"""

import pytest
import test_cql
from conftest import load_script
from oracles import assert_compiled_is_eager
from test_cql import (  # noqa: F401
    draws,
    test_actor_loss,
    test_at_its_threshold_the_penalty_is_zero_and_the_multiplier_stays,
    test_critic_loss,
    test_each_optimizer_moves_its_own_networks_only,
    test_gap_of_equal_values,
    test_gap_of_equal_values_by_form,
    test_max_target_backup_is_the_best_action_by_the_lesser_critic,
    test_multiplier_gradient,
    test_temperature_gradient,
    test_the_first_update_already_descends_the_actors_loss_on_the_new_critic,
    test_the_mean_acts,
    test_without_weight_there_is_no_entropy_in_the_target,
)

cql = load_script("finetune/cql.py")


@pytest.fixture(autouse=True)
def finetuned(monkeypatch):
    """From now on the imported tests test this script."""
    monkeypatch.setattr(test_cql, "cql", cql)


def test_the_imported_tests_test_this_script():
    assert type(test_cql.make()) is cql.CQL


@pytest.mark.equation(5)
def test_compiled_updates_equal_eager_ones_and_the_target_is_the_exact_average(batch):
    fields = {"tau": 0.1, "lagrange_gap": 1.0, "max_target_backup": True}
    assert_compiled_is_eager(cql, [test_cql.make(**fields), test_cql.make(**fields)], batch)
