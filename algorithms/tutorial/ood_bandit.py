"""Why offline reinforcement learning is hard, in a minute: one step, one action in [-1, 1], three learners.

Somebody tried actions around 0.3 and logged what each earned, with noise. Learners see that log and nothing
else, and have to name a better action. Each fits a network Q(a) to the log while an actor, here one number
pi, climbs Q. Among the logged actions Q is right. Beyond them no reward corrects it, and it goes on rising as
it rose there, while the true reward peaks at 0.5 and falls. So the naive actor leaves the data and earns less
than the policy that wrote the log. Online it would try its action, be disappointed and mend Q; offline it
never finds out. One remedy is in Q: push it down at actions that are not in the data, as CQL does. Another is
in the actor: hold it near the actions of the data, as TD3+BC does.

                                                     naive   CQL-style   TD3+BC-style
  (1)  L_Q = mean (Q(a) - r)^2                         x                      x
  (2)  L_Q = (1) + w (log sum_u exp Q(u) - mean Q(a))            x                  u ~ U(-1, 1)
  (3)  L_pi = -Q(pi)                                   x         x
  (4)  L_pi = -alpha Q(pi) / |Q(pi)| + mean (pi - a)^2                        x     |Q(pi)|: no gradient

The support gap is the other scripts' actor/support_gap: the mean distance of the chosen action from the
data's. For the behaviour policy it is the distance between two of its own actions.

With more than one step it gets worse: the targets of Q then contain Q at the actor's own next action, so the
error feeds on itself. The full algorithms: algorithms/offline/cql.py, td3_bc.py, and iql.py, which never asks
Q about an action that is not in the data.

What was varied, one at a time, 10 seeds each (and CQL_WEIGHT 1). The picture stays the same without noise
and with three times as much, with tanh networks, with 128 units and with SPREAD 0.03. Where it does not:
- SPREAD 0.3 or actions all over [-1, 1]: the data show the peak, the naive learner finds it (return 0.99) and
  beats TD3+BC, which is held back (0.85 and 0.30). With SPREAD 0.14 some of its seeds find it.
- BEST 0.7: the naive learner goes too far and still earns 0.5, the behaviour policy 0.2. Leaving the data
  is a bet that may pay; the log cannot tell.
- Three times the updates: one naive actor of twenty stopped in the data.
- ALPHA 2.5, TD3+BC's own: that actor leaves, too (0.24). Over a long task one action is a small share of Q;
  here it is all of Q, and alpha has to be smaller. CQL_WEIGHT 10 only imitates (0.64).
ALPHA and CQL_WEIGHT were chosen with the true reward in view, which offline nobody has.

  python algorithms/tutorial/ood_bandit.py
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

BEST, WIDTH, NOISE = 0.5, 0.3, 0.1  # of the reward: where its peak is, how wide, deviation of the noise
MEAN, SPREAD, LOGGED = 0.3, 0.07, 100  # of the behaviour policy: mean, deviation, actions in the log
HIDDEN, LEARNING_RATE = 32, 3e-3  # units in each of two hidden layers; Adam's step size, of Q and pi
CQL_WEIGHT, UNSEEN = 0.5, 32  # w of (2), and how many actions u it draws in an update
ALPHA = 0.05  # of (4)
WHY = {  # in the picture
    "naive": "Q goes on rising where there are no data,\nand the actor follows it there",
    "CQL-style": "Q is pushed down where there are no data,\nso the actor stays",
    "TD3+BC-style": "Q rises as it does for the naive actor,\nbut this one is held near the data",
}
COLORS = {"naive": "#D55E00", "CQL-style": "#009E73", "TD3+BC-style": "#0072B2"}  # for all eyes


# ------------------------- The problem. Shapes: E seeds, B logged actions -------------------------


def true_reward(actions: Tensor) -> Tensor:
    """What actions earn on average. Learners never see it."""
    return (-((actions - BEST) / WIDTH).square()).exp()


def log_data(seeds: int) -> tuple[Tensor, Tensor]:
    """Actions [E, B, 1] of the behaviour policy and their noisy rewards [E, B, 1]: each seed has its own."""
    actions = (MEAN + SPREAD * torch.randn(seeds, LOGGED, 1)).clamp(-1, 1)
    return actions, true_reward(actions) + NOISE * torch.randn(seeds, LOGGED, 1)


def gap_to_data(chosen: Tensor, actions: Tensor) -> Tensor:
    """Support gap [E]: mean distance of `chosen` [E, any, 1] from the data's actions [E, B, 1]."""
    return (chosen - actions.mT).abs().mean((1, 2))


# ------------------------------------------ The learners ------------------------------------------


def critic_loss(critic: nn.Module, actions: Tensor, rewards: Tensor) -> Tensor:
    return (critic(actions) - rewards).square().mean((1, 2))  # (1) [E]


def cql_critic_loss(critic: nn.Module, actions: Tensor, rewards: Tensor) -> Tensor:
    unseen = 2 * torch.rand(len(actions), UNSEEN, 1) - 1  # u
    push = critic(unseen).logsumexp((1, 2)) - critic(actions).mean((1, 2))  # [E]
    return critic_loss(critic, actions, rewards) + CQL_WEIGHT * push  # (2) [E]


def actor_loss(critic: nn.Module, chosen: Tensor, actions: Tensor) -> Tensor:
    return -critic(chosen).mean((1, 2))  # (3) [E]


def td3_bc_actor_loss(critic: nn.Module, chosen: Tensor, actions: Tensor) -> Tensor:
    q = critic(chosen).mean((1, 2))  # [E]
    return -ALPHA * q / q.detach().abs() + (chosen - actions).square().mean((1, 2))  # (4) [E]


LEARNERS = {
    "naive": (critic_loss, actor_loss),
    "CQL-style": (cql_critic_loss, actor_loss),
    "TD3+BC-style": (critic_loss, td3_bc_actor_loss),
}


def train_learner(losses: tuple, actions: Tensor, rewards: Tensor, updates: int) -> tuple[nn.Module, Tensor]:
    """Q and the chosen actions [E, 1, 1] after `updates` of both, by the losses of a line of LEARNERS."""
    loss_of_critic, loss_of_actor = losses
    sizes = (1, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)
    first, second, last = (EnsembleLinear(len(actions), *size) for size in sizes)
    critic = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)  # [E, any, 1] -> [E, any, 1]
    actor = nn.Parameter(torch.zeros(len(actions), 1, 1))  # before tanh: pi starts at 0
    critic_optimizer = torch.optim.Adam(critic.parameters(), LEARNING_RATE, fused=True)
    actor_optimizer = torch.optim.Adam([actor], LEARNING_RATE, fused=True)
    for _ in range(updates):  # seeds share no weights: the gradient of the sum is each one's own
        descend(critic_optimizer, loss_of_critic(critic, actions, rewards).sum())
        descend(actor_optimizer, loss_of_actor(critic, actor.tanh(), actions).sum())
    return critic, actor.tanh().detach()


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


def tabulate(learned: dict[str, tuple[nn.Module, Tensor]], actions: Tensor) -> pd.DataFrame:
    """A row per policy and seed: its true return, its support gap, and what the learner's Q promises it."""
    policies = {"behaviour": actions, **{name: chosen for name, (_, chosen) in learned.items()}}
    policies["oracle"] = torch.full((len(actions), 1, 1), BEST)
    tables = []
    for name, chosen in policies.items():
        columns = {"return": true_reward(chosen).mean((1, 2)), "support gap": gap_to_data(chosen, actions)}
        if name in learned:
            columns["Q promises"] = learned[name][0](chosen).detach().flatten()
        tables.append(pd.DataFrame({"policy": name, **columns}))
    return pd.concat(tables, ignore_index=True)


def show_spread(values: pd.Series) -> str:
    """Mean and, of more than one seed, standard deviation; of nothing, nothing."""
    spread = f" ± {values.std():.2f}" if len(values) > 1 else ""
    return "" if values.isna().all() else f"{values.mean():.2f}{spread}"


def draw_panels(path: Path, learned: dict, actions: Tensor, rewards: Tensor) -> None:
    """A panel per learner: the truth, the first seed's data, and every seed's Q and chosen action."""
    figure, grid = Figure(figsize=(14, 5.2), layout="constrained"), torch.linspace(-1, 1, 401)
    axes = figure.subplots(1, len(learned), sharey=True)
    for axis, (name, (critic, chosen)) in zip(axes, learned.items()):
        color, earned = COLORS[name], true_reward(chosen).flatten()
        chosen, promised = chosen.flatten(), critic(chosen).detach().flatten()
        curves = critic(grid.expand(len(chosen), -1).unsqueeze(-1)).detach().squeeze(-1)  # [E, 401]
        axis.axvspan(*actions[0].aminmax(), color="#EEEEEE", lw=0, label="range of the data")
        axis.axhline(true_reward(actions).mean(), color="#888888", ls="--", label="what the data earn")
        axis.plot(actions[0, :, 0], rewards[0, :, 0], ".", color="#888888", ms=4, label="the data (one seed)")
        axis.plot(grid, true_reward(grid), color="black", lw=2.5, label="true reward")
        axis.plot(grid, curves[0], color=color, lw=1, alpha=0.6, label="learned Q (all seeds)")
        axis.plot(grid, curves[1:].T, color=color, lw=1, alpha=0.6)
        axis.vlines(chosen, earned, promised, color=color, lw=1, ls=":")
        axis.plot(chosen, promised, "o", color=color, mfc="white", label="its choice: what Q promises")
        axis.plot(chosen, earned, "D", color=color, mec="white", ms=9, label="what that earns")
        axis.set_title(f"{name} earns {earned.mean():.2f}", color=color, loc="left", size=13, weight="bold")
        axis.text(0.02, 0.97, WHY[name], transform=axis.transAxes, va="top", color=color, size=11)
        axis.set(xlabel="action", xlim=(-1, 1.04), ylim=(-1, 2.5), xticks=[-1, -0.5, 0, 0.5, 1])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reward")
    key = axes[0].get_legend_handles_labels()
    for handle in figure.legend(*key, loc="outside lower center", ncols=7, frameon=False).legend_handles[4:]:
        handle.set_color("#444444")  # the learners' colours differ
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def run() -> None:
    """The command line; argparse, since three fields need none of the 80 lines that other scripts share."""
    title = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=title, usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=10, help="repetitions, each with its own data")
    parser.add_argument("--updates", type=int, default=1000, help="gradient updates of each learner")
    parser.add_argument("--picture", default="results/runs/tutorial/ood_bandit.png", help="the PNG to draw")
    fields = parser.parse_args()
    path = Path(fields.picture)
    if min(fields.seeds, fields.updates) < 1:
        parser.error("--seeds and --updates: at least 1")
    if path.suffix != ".png" or path.is_dir():
        parser.error(f"--picture: {path} is not the name of a .png file")
    torch.manual_seed(0)
    actions, rewards = log_data(fields.seeds)
    learned = {n: train_learner(losses, actions, rewards, fields.updates) for n, losses in LEARNERS.items()}
    table = tabulate(learned, actions).groupby("policy", sort=False).agg(show_spread)
    print(f"Mean ± standard deviation over {fields.seeds} seeds:\n\n{table.rename_axis(None)}\n")
    try:
        draw_panels(path, learned, actions, rewards)
    except OSError as error:
        parser.error(f"cannot write the picture: {error}")
    print(f"Picture: {path}")


if __name__ == "__main__":
    run()
