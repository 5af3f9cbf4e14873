"""What policies make of data that have more than one way, in a minute: one state, four policies, a ring.

Somebody's actions lie on a ring: any direction was right, and to stand still never was. Policies see these
actions and have to draw their like. The Gaussian one can only say where the middle is and how wide a spread:
its mean, which is all that imitation by squares learns, is the one action that nobody took, and most of what
it draws is off the ring. A diffusion model and a flow carry noise to the ring in many small steps, and so
take all of it. They cost a pass through the network in each step. The one-step flow is a second network. It
learns to do in one pass what the flow does in many: it costs what the Gaussian does, and a critic's slope
would reach it directly.

  (1)  L_G = mean (log s + ((a - m) / s)^2 / 2),  pi = m + s z                    z ~ N(0, 1) here and below
  (2)  x_t = sqrt(abar_t) a + sqrt(1 - abar_t) eps,  L_D = mean (eps - eps_theta(x_t, t))^2      eps ~ N(0, 1)
  (3)  beta_t = 1 - exp(-0.1 / T - 9.9 (2t - 1) / (2 T^2)),  abar_t = (1 - beta_1) ... (1 - beta_t)
  (4)  x = clip((x_t - sqrt(1 - abar_t) eps_theta) / sqrt(abar_t), -1, 1)         from x_T = z on; pi = x_0
       m = (sqrt(abar_{t-1}) beta_t x + sqrt(1 - beta_t) (1 - abar_{t-1}) x_t) / (1 - abar_t),  abar_0 = 1
       x_{t-1} = m + sqrt(beta_t (1 - abar_{t-1}) / (1 - abar_t)) z
  (5)  x_t = (1 - t) z + t a,  L_F = mean (v(x_t, t) - (a - z))^2                 t uniform in [0, 1]
  (6)  x_{k+1} = x_k + v(x_k, k / K) / K,  Phi(z) = x_K                           from x_0 = z on; pi = Phi(z)
  (7)  L_1 = mean (mu(z) - Phi(z))^2                                              pi = mu(z)

The table: the share of a policy's actions that lie on the ring, where 99.7 % of the data do; the share of the
ring's twelfths that get at least half of their fair part of these; the passes that an action costs.

The full algorithms: algorithms/offline/diffusion_policy.py imitates; diffusion_ql.py and idql.py put a
diffusion model to work for Q, fql.py a flow and its one-step copy.

What was varied, one at a time:
- The flow itself in fewer steps, K: with 1 or 2 none of its actions is on the ring, as from pure noise
  the velocity of (5) leads to the mean; 84 % are with 5, and 96 % with 20. One step has to be learned.
- T = 5, as in diffusion_ql.py and idql.py: 27 % by diffusion.
- 700 updates: 76 % by diffusion, 92 % by both flows. In the end all three come to the same.

  python algorithms/tutorial/multimodal.py
"""

import argparse
import math
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

RADIUS, WIDTH, LOGGED = 0.7, 0.05, 1000  # of the ring: its radius, the deviation from it, actions in the log
HIDDEN, LEARNING_RATE, BATCH = 64, 1e-2, 128  # units in three hidden layers; Adam's first step size
DIFFUSION_STEPS, FLOW_STEPS = 20, 10  # T of (3), K of (6)
DRAWN, SECTORS = 1000, 12  # actions that the table and the picture draw of a policy; parts of the ring
PASSES = {"Gaussian": 1, "diffusion": DIFFUSION_STEPS, "flow": FLOW_STEPS, "one-step flow": 1}
WHY = {  # in the picture
    "data": "any direction,\nnever the middle",
    "Gaussian": "a middle and a spread:\nmost of it where nobody was",
    "diffusion": f"noise taken off\nin {DIFFUSION_STEPS} steps",
    "flow": f"noise carried to the ring\nin {FLOW_STEPS} steps",
    "one-step flow": "what the flow does,\nlearned as one step",
}
COLORS = {"data": "#666666", "Gaussian": "#D55E00", "diffusion": "#0072B2", "flow": "#009E73",
          "one-step flow": "#CC79A7"}  # for all eyes


# ---------------- The problem. Shapes: E seeds, B actions, each of two entries in [-1, 1] ----------------


def log_ring(seeds: int) -> Tensor:
    """Actions [E, LOGGED, 2] around the ring: each seed has its own."""
    angles = 2 * math.pi * torch.rand(seeds, LOGGED, 1)
    radii = RADIUS + WIDTH * torch.randn(seeds, LOGGED, 1)
    return (radii * torch.cat([angles.cos(), angles.sin()], -1)).clamp(-1, 1)


def on_ring(actions: Tensor) -> Tensor:
    """Which of the actions [..., 2] are no farther from the ring than three deviations."""
    return (actions.norm(dim=-1) - RADIUS).abs() <= 3 * WIDTH


def sectors_covered(actions: Tensor) -> Tensor:
    """Share [E] of the ring's sectors that get at least half of a fair share of `actions` [E, B, 2] on it."""
    turns = torch.atan2(actions[..., 1], actions[..., 0]) / (2 * math.pi) + 0.5  # from 0 to 1
    sectors = (turns * SECTORS).long().clamp(max=SECTORS - 1)
    chosen = nn.functional.one_hot(sectors, SECTORS) * on_ring(actions).unsqueeze(-1)  # [E, B, SECTORS]
    counts = chosen.sum(1)
    fair = counts.sum(1, keepdim=True).clamp(min=1) / SECTORS
    return (counts >= fair / 2).float().mean(1)


# ----------------------------------------- The four policies -----------------------------------------


class Gaussian(nn.Module):
    def __init__(self, seeds: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(seeds, 1, 2))  # m
        self.log_std = nn.Parameter(torch.zeros(seeds, 1, 2))  # log s

    def loss(self, actions: Tensor) -> Tensor:
        errors = (actions - self.mean) / self.log_std.exp()
        return (self.log_std + errors.square() / 2).mean((1, 2))  # (1) [E]

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.log_std.exp() * noise


class Diffusion(nn.Module):
    def __init__(self, seeds: int):
        super().__init__()
        self.net = ring_network(seeds, 3)  # eps_theta
        self.beta, self.alpha_bar = vp_schedule(DIFFUSION_STEPS)  # [T]

    def loss(self, actions: Tensor) -> Tensor:
        steps = torch.randint(DIFFUSION_STEPS, actions[..., :1].shape)  # t - 1
        alpha_bar, noise = self.alpha_bar[steps], torch.randn_like(actions)
        noisy = alpha_bar.sqrt() * actions + (1 - alpha_bar).sqrt() * noise
        guess = self.net(torch.cat([noisy, steps / DIFFUSION_STEPS], -1))
        return (noise - guess).square().mean((1, 2))  # (2) [E]

    def sample(self, noise: Tensor) -> Tensor:
        actions, before = noise, torch.cat([torch.ones(1), self.alpha_bar[:-1]])  # abar_{t-1}
        for step in reversed(range(DIFFUSION_STEPS)):  # t - 1
            beta, alpha_bar, alpha_bar_before = self.beta[step], self.alpha_bar[step], before[step]
            times = torch.full_like(actions[..., :1], step / DIFFUSION_STEPS)
            guess = self.net(torch.cat([actions, times], -1))
            clean = ((actions - (1 - alpha_bar).sqrt() * guess) / alpha_bar.sqrt()).clamp(-1, 1)
            kept = (1 - beta).sqrt() * (1 - alpha_bar_before) * actions
            mean = (alpha_bar_before.sqrt() * beta * clean + kept) / (1 - alpha_bar)
            variance = beta * (1 - alpha_bar_before) / (1 - alpha_bar)  # 0 in the last step
            actions = mean + variance.sqrt() * torch.randn_like(actions)  # (4)
        return actions


class Flow(nn.Module):
    def __init__(self, seeds: int):
        super().__init__()
        self.net = ring_network(seeds, 3)  # v

    def loss(self, actions: Tensor) -> Tensor:
        noise, times = torch.randn_like(actions), torch.rand_like(actions[..., :1])
        between = (1 - times) * noise + times * actions
        velocity = self.net(torch.cat([between, times], -1))
        return (velocity - (actions - noise)).square().mean((1, 2))  # (5) [E]

    def sample(self, noise: Tensor) -> Tensor:
        actions = noise
        for step in range(FLOW_STEPS):
            times = torch.full_like(actions[..., :1], step / FLOW_STEPS)
            actions = actions + self.net(torch.cat([actions, times], -1)) / FLOW_STEPS  # (6)
        return actions


class OneStepFlow(nn.Module):
    def __init__(self, seeds: int, flow: Flow):
        super().__init__()
        self.net, self.flow = ring_network(seeds, 2), [flow]  # mu; in a list, whose weights are no part of it

    def loss(self, actions: Tensor) -> Tensor:
        noise = torch.randn_like(actions)  # the actions themselves it never sees
        with torch.no_grad():
            wanted = self.flow[0].sample(noise)
        return (self.net(noise) - wanted).square().mean((1, 2))  # (7) [E]

    def sample(self, noise: Tensor) -> Tensor:
        return self.net(noise)


def train_policy(policy: nn.Module, actions: Tensor, updates: int) -> nn.Module:
    """The policy after so many updates on batches of the actions [E, LOGGED, 2]."""
    optimizer = torch.optim.Adam(policy.parameters(), LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):  # seeds share no weights: the gradient of the sum is each one's own
        rows = torch.randint(LOGGED, (len(actions), BATCH, 1))
        descend(optimizer, policy.loss(actions.take_along_dim(rows, 1)).sum())
        schedule.step()
    return policy


def train_policies(actions: Tensor, updates: int) -> dict[str, nn.Module]:
    """All four by their names in the table."""
    seeds = len(actions)
    learned = {"Gaussian": Gaussian(seeds), "diffusion": Diffusion(seeds), "flow": Flow(seeds)}
    learned["one-step flow"] = OneStepFlow(seeds, learned["flow"])
    return {name: train_policy(policy, actions, updates) for name, policy in learned.items()}


# ------------------------------------------- Networks -------------------------------------------


def ring_network(seeds: int, inputs: int) -> nn.Sequential:
    """[E, B, inputs] -> [E, B, 2]."""
    sizes, layers = [inputs] + [HIDDEN] * 3, []
    for i, o in zip(sizes, sizes[1:]):
        layers += [EnsembleLinear(seeds, i, o), nn.ReLU()]
    return nn.Sequential(*layers, EnsembleLinear(seeds, HIDDEN, 2))


def vp_schedule(steps: int) -> tuple[Tensor, Tensor]:
    """beta_t and abar_t, both [T], of the variance preserving schedule: t = 1 comes first."""
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    beta = 1 - torch.exp(-0.1 / steps - 0.5 * (10 - 0.1) * (2 * t - 1) / steps**2)  # (3)
    return beta.float(), (1 - beta).cumprod(0).float()


class EnsembleLinear(nn.Module):
    """E linear layers side by side, or the first len(x) of them: [E, B, inputs] -> [E, B, outputs]."""

    def __init__(self, ensemble: int, inputs: int, outputs: int):
        super().__init__()
        bound = inputs**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(ensemble, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(ensemble, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight[: len(x)], self.bias[: len(x)]
        if weight.shape[-1] == 1:  # a sum of products is faster than a product with one column
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.bmm(x, weight) + bias


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of `loss` for the parameters of `optimizer` and no others."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        parameter.grad = gradient.contiguous()  # fused Adam takes no account of strides
    optimizer.step()


# ----------------------------------- The table and the picture ------------------------------------


@torch.no_grad()
def draw_all(learned: dict[str, nn.Module], actions: Tensor) -> dict[str, Tensor]:
    """Actions [E, any, 2] of the data and of every policy, in bounds."""
    drawn = {"data": actions}
    for name, policy in learned.items():
        drawn[name] = policy.sample(torch.randn(len(actions), DRAWN, 2)).clamp(-1, 1)
    return drawn


def tabulate_ring(drawn: dict[str, Tensor]) -> pd.DataFrame:
    """A row per policy and seed: what share of its actions is on the ring, and of the ring in them."""
    tables = []
    for name, actions in drawn.items():
        columns = {"on the ring": on_ring(actions).float().mean(1), "sectors": sectors_covered(actions)}
        tables.append(pd.DataFrame({"policy": name, **columns}))
    return pd.concat(tables, ignore_index=True)


def show_spread(values: pd.Series) -> str:
    """Mean and, of more than one seed, standard deviation; of nothing, nothing."""
    spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return "" if values.isna().all() else f"{values.mean():.2f}{spread}"


def draw_rings(path: Path, drawn: dict[str, Tensor], learned: dict[str, nn.Module]) -> None:
    """A panel each for the data and the policies: actions of the first seed, the share of all seeds."""
    figure = Figure(figsize=(15, 4.1), layout="constrained")
    axes = figure.subplots(1, len(drawn), sharex=True, sharey=True)
    for axis, (name, actions) in zip(axes, drawn.items()):
        color, share = COLORS[name], on_ring(actions).float().mean()
        for radius in (RADIUS - 3 * WIDTH, RADIUS + 3 * WIDTH):
            circle = 2 * math.pi * torch.linspace(0, 1, 200)
            axis.plot(radius * circle.cos(), radius * circle.sin(), color="#BBBBBB", lw=1)
        axis.plot(*actions[0].T, ".", color=color, ms=3, alpha=0.6)
        if name == "Gaussian":
            axis.plot(*learned[name].mean[0, 0].detach(), "X", color="black", mec="white", ms=11)
            axis.text(0, 0.12, "its mean", ha="center", bbox={"color": "white", "alpha": 0.8, "pad": 1})
        axis.set_title(f"{name}\n{share:.0%} on the ring", color=color, size=13, weight="bold")
        axis.set_xlabel(WHY[name], color=color, size=11)
        axis.set(aspect="equal", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def demonstrate() -> None:
    """The command line; argparse, since three fields need none of the 80 lines that other scripts share."""
    title = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=title, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, help="repetitions, each with its own data")
    parser.add_argument("--updates", type=int, default=2000, help="gradient updates of each policy")
    parser.add_argument("--picture", default="results/runs/tutorial/multimodal.png", help="the PNG to draw")
    fields = parser.parse_args()
    path = Path(fields.picture)
    if min(fields.seeds, fields.updates) < 1:
        parser.error("--seeds and --updates: at least 1")
    if path.suffix != ".png" or path.is_dir():
        parser.error(f"--picture: {path} is not the name of a .png file")
    torch.manual_seed(0)
    actions = log_ring(fields.seeds)
    learned = train_policies(actions, fields.updates)
    drawn = draw_all(learned, actions)
    table = tabulate_ring(drawn).groupby("policy", sort=False).agg(show_spread)
    table["passes"] = [PASSES.get(name, "") for name in table.index]
    print(f"Mean ± standard deviation over {fields.seeds} seeds:\n\n{table.rename_axis(None)}\n")
    try:
        draw_rings(path, drawn, learned)
    except OSError as error:
        parser.error(f"cannot write the picture: {error}")
    print(f"Picture: {path}")


if __name__ == "__main__":
    demonstrate()
