"""algorithms/tutorial/multimodal.py: the ring, four policies and their losses against NumPy, the command."""

import re
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import load_script
from torch import nn

ring = load_script("tutorial/multimodal.py")
ACTIONS = np.array([[[0.5, -0.2], [0.1, 0.7], [-0.6, 0.3]], [[0.0, 0.4], [-0.3, -0.3], [0.8, 0.1]]])
NAMES = ["data", "Gaussian", "diffusion", "flow", "one-step flow"]


class Line(nn.Module):
    """Stands in for a network: x, y and t -> 0.3 x + 0.1 t - 0.2 and -0.4 y + 0.1 t; two inputs have no t."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        times = inputs[..., 2:].sum(-1)
        first, second = inputs[..., 0], inputs[..., 1]
        return torch.stack([0.3 * first + 0.1 * times - 0.2, -0.4 * second + 0.1 * times], -1)


def line(x: np.ndarray, times) -> np.ndarray:
    return np.stack([0.3 * x[..., 0] + 0.1 * times - 0.2, -0.4 * x[..., 1] + 0.1 * times], -1)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def normal(*shape: int) -> np.ndarray:
    """What torch draws next."""
    return torch.randn(*shape).double().numpy()


def with_line(policy):
    policy.net = Line()
    return policy


@pytest.fixture(scope="module")
def learned() -> tuple[dict, dict]:
    """The four policies of 2 seeds after 500 updates, and what they draw."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    actions = ring.log_ring(2)
    found = ring.train_policies(actions, 500)
    return found, ring.draw_all(found, actions)


@pytest.fixture
def call(monkeypatch, capsys):
    """call("--seeds", 2, ...) is the command line in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["multimodal.py", *map(str, arguments)])
        status = 0
        try:
            ring.demonstrate()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


# The problem


def test_data_lie_on_the_ring_in_all_directions():
    torch.manual_seed(0)
    actions = ring.log_ring(50).double().numpy()
    assert actions.shape == (50, 1000, 2)
    radii, angles = np.hypot(*actions.T), np.arctan2(*actions.T)
    assert radii.mean() == pytest.approx(0.7, abs=0.002)
    assert radii.std() == pytest.approx(0.05, abs=0.002)
    assert np.abs(np.histogram(angles, 8, (-np.pi, np.pi))[0] / 50_000 - 1 / 8).max() < 0.01
    assert len({row.tobytes() for row in actions}) == 50  # each seed has its own


def test_what_is_on_the_ring_and_which_sectors_are_covered():
    near, far = [[0.7, 0], [0, -0.84], [0.4, 0.39]], [[0, 0.86], [0.38, 0.38], [0, 0]]
    assert ring.on_ring(tensor([near, far])).tolist() == [[True] * 3, [False] * 3]
    angles = (np.arange(12) + 0.5) / 12 * 2 * np.pi
    one_each = 0.7 * np.stack([np.cos(angles), np.sin(angles)], -1)
    inside = np.zeros((12, 2))  # counts for no sector
    half = np.concatenate([one_each[:6], one_each[:6]])
    uneven = np.concatenate([np.repeat(one_each[:1], 10, 0), one_each[1:3]])
    for actions, share in ((one_each, 1), (half, 1 / 2), (inside, 0), (uneven, 3 / 12)):
        assert ring.sectors_covered(tensor(actions[None])).tolist() == pytest.approx([share])
    few = np.concatenate([np.repeat(one_each[:6], 4, 0), one_each[6:]])  # half of 30 / 12
    assert ring.sectors_covered(tensor(few[None])).item() == 1 / 2


# Losses and samples


@pytest.mark.equation(1)
def test_1_gaussian():
    policy = ring.Gaussian(2)
    mean, log_std = np.array([[[0.1, -0.3]], [[0.5, 0.2]]]), np.array([[[-0.5, 0.3]], [[0.1, -1.0]]])
    policy.mean.data, policy.log_std.data = tensor(mean), tensor(log_std)
    density = np.exp(-(((ACTIONS - mean) / np.exp(log_std)) ** 2) / 2) / np.exp(log_std)
    found = policy.loss(tensor(ACTIONS)).detach()
    np.testing.assert_allclose(found, -np.log(density).mean((1, 2)), rtol=1e-5)
    noise = np.ones((2, 4, 2)) * 0.5
    wanted = np.broadcast_to(mean + 0.5 * np.exp(log_std), noise.shape)
    np.testing.assert_allclose(policy.sample(tensor(noise)).detach(), wanted, rtol=1e-5)


def alpha_bars() -> np.ndarray:
    """abar_1 to abar_20."""
    times = np.arange(1, 21) / 20
    return np.exp(-0.1 * times - 4.95 * times**2)


@pytest.mark.equation(2, 3)
def test_2_3_diffusion_loss():
    policy = with_line(ring.Diffusion(2))
    np.testing.assert_allclose(policy.alpha_bar, alpha_bars(), rtol=1e-5)
    torch.manual_seed(3)
    steps, noise = torch.randint(20, (2, 3, 1)).numpy(), normal(2, 3, 2)
    alpha_bar = alpha_bars()[steps]
    noisy = np.sqrt(alpha_bar) * ACTIONS + np.sqrt(1 - alpha_bar) * noise
    wanted = ((noise - line(noisy, steps[..., 0] / 20)) ** 2).mean((1, 2))
    torch.manual_seed(3)
    np.testing.assert_allclose(policy.loss(tensor(ACTIONS)), wanted, rtol=1e-5)


@pytest.mark.equation(4)
def test_4_diffusion_samples():
    """By Bayes: a likelihood and a prior, both normal, around the clipped x_0."""
    policy, bars = with_line(ring.Diffusion(2)), alpha_bars()
    x = start = np.random.default_rng(0).normal(size=(2, 5, 2))
    torch.manual_seed(4)
    for t in range(20, 0, -1):
        z, now, before = normal(2, 5, 2), bars[t - 1], bars[t - 2] if t > 1 else 1.0
        clean = np.clip((x - np.sqrt(1 - now) * line(x, (t - 1) / 20)) / np.sqrt(now), -1, 1)
        if t > 1:
            alpha = now / before
            precision = alpha / (1 - alpha) + 1 / (1 - before)
            pull = np.sqrt(alpha) * x / (1 - alpha) + np.sqrt(before) * clean / (1 - before)
            x = pull / precision + z / np.sqrt(precision)
    torch.manual_seed(4)
    np.testing.assert_allclose(policy.sample(tensor(start)), clean, atol=1e-4)


@pytest.mark.equation(5)
def test_5_flow_loss():
    policy = with_line(ring.Flow(2))
    torch.manual_seed(5)
    noise, times = normal(2, 3, 2), torch.rand(2, 3, 1).double().numpy()
    between = (1 - times) * noise + times * ACTIONS
    wanted = ((line(between, times[..., 0]) - (ACTIONS - noise)) ** 2).mean((1, 2))
    torch.manual_seed(5)
    np.testing.assert_allclose(policy.loss(tensor(ACTIONS)), wanted, rtol=1e-5)


def follow(x: np.ndarray) -> np.ndarray:
    for step in range(10):
        x = x + line(x, step / 10) / 10
    return x


@pytest.mark.equation(6)
def test_6_flow_samples():
    noise = np.random.default_rng(0).normal(size=(2, 5, 2))
    np.testing.assert_allclose(with_line(ring.Flow(2)).sample(tensor(noise)), follow(noise), rtol=1e-4)


@pytest.mark.equation(7)
def test_7_one_step_flow():
    """It learns from the flow alone, and does not move it."""
    flow = ring.Flow(2)
    policy = ring.OneStepFlow(2, flow)
    assert not {*map(id, policy.parameters())} & {*map(id, flow.parameters())}
    policy.loss(tensor(ACTIONS)).sum().backward()
    assert all(weight.grad is None for weight in flow.parameters())
    assert all(weight.grad is not None for weight in policy.parameters())
    flow.net = policy.net = Line()
    torch.manual_seed(7)
    noise = normal(2, 3, 2)
    torch.manual_seed(7)
    wanted = ((line(noise, 0) - follow(noise)) ** 2).mean((1, 2))
    np.testing.assert_allclose(policy.loss(tensor(ACTIONS)), wanted, rtol=1e-4)
    np.testing.assert_allclose(policy.sample(tensor(noise)), line(noise, 0), rtol=1e-4)


def test_equations_of_the_docstring_are_named_in_the_code():
    code = Path(ring.__file__).read_text().split('"""', 2)[2]
    numbers = re.findall(r"\n  \((\d)\)  ", ring.__doc__)
    assert numbers == [*"1234567"]
    assert {*re.findall(r"# \((\d)\)", code)} >= {*numbers}


# What becomes of the policies


def test_only_the_gaussian_leaves_the_ring_and_all_ways_are_kept(learned):
    _, drawn = learned
    table = ring.tabulate_ring(drawn).groupby("policy", sort=False).mean()
    assert [*table.index] == NAMES == [*ring.WHY] == [*ring.COLORS]
    share = table["on the ring"]
    assert share["data"] > 0.99
    assert share["Gaussian"] < 0.4
    assert share["diffusion"] > 0.5
    assert min(share["flow"], share["one-step flow"]) > 0.75
    assert table["sectors"].min() > 0.9


def test_the_gaussians_mean_is_where_nobody_was(learned):
    found, drawn = learned
    assert found["Gaussian"].mean.norm(dim=-1).max() < 0.1
    assert drawn["data"].norm(dim=-1).min() > 0.4
    deviation = found["Gaussian"].log_std.exp().detach()
    assert (deviation - 0.7 / 2**0.5).abs().max() < 0.06  # of a ring's either coordinate


def test_a_flow_in_one_step_leads_to_the_middle(learned, monkeypatch):
    """So the step has to be learned."""
    found, _ = learned
    monkeypatch.setattr(ring, "FLOW_STEPS", 1)
    with torch.no_grad():
        actions = found["flow"].sample(torch.randn(2, 1000, 2))
    assert actions.norm(dim=-1).mean() < 0.3
    assert ring.on_ring(actions).float().mean() < 0.05


def test_passes_are_those_of_the_networks(monkeypatch):
    for name, policy in (("diffusion", ring.Diffusion(1)), ("flow", ring.Flow(1)),
                         ("one-step flow", ring.OneStepFlow(1, ring.Flow(1)))):
        calls, forward = [], policy.net.forward
        monkeypatch.setattr(policy.net, "forward", lambda x, calls=calls, f=forward: calls.append(1) or f(x))
        policy.sample(torch.randn(1, 5, 2))
        assert len(calls) == ring.PASSES[name], name


# The command


def test_prints_the_table_and_draws(call, tmp_path, monkeypatch):
    picture = tmp_path / "deep/er/picture.png"
    status, out, err = call("--seeds", 2, "--updates", 3, "--picture", picture)
    assert (status, err) == (0, "")
    rows = [re.match(r"(one-step flow|\w+)", text)[0] for text in out.splitlines() if "±" in text]
    assert rows == ["Mean", *NAMES]
    assert "over 2 seeds" in out
    assert re.findall(r"(\d+)$", out, re.MULTILINE) == ["1", "20", "10", "1"]  # passes
    assert out.endswith(f"Picture: {picture}\n")
    height, width, _ = matplotlib.image.imread(picture).shape
    assert width > 3 * height
    assert list(picture.parent.iterdir()) == [picture]
    monkeypatch.setattr(ring, "draw_rings", lambda *_: None)
    assert call("--seeds", 2, "--updates", 3, "--picture", picture)[1] == out
    one = call("--seeds", 1, "--updates", 1, "--picture", picture)[1]
    assert one.count("±") == 1  # of the heading


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--seeds", "0"), "at least 1"),
        (("--updates", "-5"), "at least 1"),
        (("--seeds", "few"), "few"),
        (("--sedes", "3"), "--sedes"),
        (("--picture", "picture.jpeg"), "picture.jpeg is not the name of a .png file"),
        (("--picture", "folder.png"), "folder.png is not the name of a .png file"),
        (("--picture", "file/picture.png", "--updates", "1", "--seeds", "1"), "cannot write"),
    ],
)
def test_errors_are_one_line(call, tmp_path, monkeypatch, arguments, cause):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    status, _, err = call("--picture", "out.png", *arguments)
    assert status == 2
    assert err.count("\n") == 1
    assert cause in err
    assert sorted(tmp_path.rglob("*")) == before
