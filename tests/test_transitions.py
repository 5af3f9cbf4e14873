"""From a Minari dataset to the transitions that the losses see, in every offline script."""

import numpy as np
import pytest
import torch
from conftest import OFFLINE
from oracles import ACTIONS, endings, episode, read


@pytest.mark.parametrize("name", OFFLINE)
def test_transitions_are_the_datas(scripts, minari_root, name):
    script = scripts[name]
    episodes = read(script, f"test/transitions/{name}-v0", endings())
    data = script.transitions(episodes, script.fit_scaler(episodes, ACTIONS, False))
    wanted = {
        "observations": [[0.1, 0.2, 0.3], [1.0, -1.1, 1.2], [1.3, 1.4, -1.5]],
        "actions": [[0.25, -0.5], [0.25, -0.5], [-1.0, 1.0]],  # in [-1, 1]
        "rewards": [1.0, 2.0, 4.0],
        "next_observations": [[0.4, -0.5, 0.6], [1.3, 1.4, -1.5], [-1.6, 1.7, 1.8]],
        "terminations": [1.0, 0.0, 0.0],  # the last one was cut
    }
    assert data.keys() == wanted.keys()
    for key, column in wanted.items():
        assert data[key].dtype == torch.float32
        np.testing.assert_allclose(data[key], column, rtol=1e-6)


def test_who_bootstraps_scales_rewards(scripts):
    scaling = {name for name in OFFLINE if hasattr(scripts[name], "scale_rewards")}
    assert {"td3_bc", "iql", "awac", "bcq", "cql"} <= scaling


@pytest.mark.parametrize("name", OFFLINE)
def test_rewards_are_scaled_and_shifted(scripts, minari_root, name):
    """Returns are 1 and 6: normalize_rewards multiplies by 1000 / 5; then comes the scale, then the shift."""
    script = scripts[name]
    if not hasattr(script, "scale_rewards"):
        assert "reward_scale" not in script.Config.__dataclass_fields__
        return
    cases = {
        (1.0, 0.0, False): [1.0, 2.0, 4.0],
        (0.5, -1.0, False): [-0.5, 0.0, 1.0],
        (0.5, -1.0, True): [99.0, 199.0, 399.0],
    }
    recorded = read(script, f"test/transitions/scaled-{name}-v0", endings())
    for (scale, shift, normalize), wanted in cases.items():
        episodes = [dict(steps) for steps in recorded]
        script.scale_rewards(episodes, scale, shift, normalize)
        data = script.transitions(episodes, script.fit_scaler(episodes, ACTIONS, False))
        assert data["rewards"].dtype == torch.float32
        np.testing.assert_allclose(data["rewards"], wanted, rtol=1e-6)


@pytest.mark.parametrize("name", OFFLINE)
def test_states_are_standardised_only_if_asked_and_constants_become_zero(scripts, minari_root, name):
    """Two transitions; the first entry of their observations never changes."""
    script = scripts[name]
    observations = np.array([[5.0, 1.0, 0.0], [5.0, 3.0, 2.0], [5.0, 8.0, 4.0]])
    constant = episode(observations, [0.0, 1.0], terminated=True)
    episodes = read(script, f"test/transitions/constant-{name}-v0", [constant])
    data = script.transitions(episodes, script.fit_scaler(episodes, ACTIONS, True))
    mean, std = np.array([5.0, 2.0, 1.0]), np.array([0.0, 1.0, 1.0]) + 1e-3  # of the first two rows
    standard = (observations - mean) / std
    np.testing.assert_allclose(data["observations"], standard[:2], atol=1e-5)
    np.testing.assert_allclose(data["next_observations"], standard[1:], atol=1e-5)
    assert (data["observations"][:, 0] == 0).all()
    raw = script.transitions(episodes, script.fit_scaler(episodes, ACTIONS, False))
    np.testing.assert_allclose(raw["observations"], observations[:2])
