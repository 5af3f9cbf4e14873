"""tools/bench.py: batches as each script's `train` makes them; another folder's scripts; cost and work."""

import dataclasses
import importlib
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import OFFLINE, ROOT
from runs import SMALL
from torch.optim.optimizer import _global_optimizer_post_hooks

sys.path.insert(0, str(ROOT / "tools"))
bench = importlib.import_module("bench")
peers = importlib.import_module("peers")
sys.path.pop(0)

CPU = torch.device("cpu")
# In the form of CORL's scripts: the actor's optimiser is built first and steps in every second update.
PEER = """
from dataclasses import asdict, dataclass
import d4rl
import gym
import numpy as np
import pyrallis
import torch
import wandb

seen = []

@dataclass
class TrainConfig:
    env: str = "hopper-medium-v2"
    device: str = "cuda"
    batch_size: int = 7
    num_workers: int = 4
    updates: int = 1000

def evaluate(env: gym.Env) -> float:
    env.seed(0)
    state, done, total = env.reset(), False, 0.0
    while not done:
        state, reward, done, _ = env.step(env.action_space.sample())
        total += reward
    return env.get_normalized_score(total)

@pyrallis.wrap()
def train(config: TrainConfig):
    env = gym.wrappers.TransformObservation(gym.make(config.env), lambda state: state)
    data = d4rl.qlearning_dataset(env)
    wandb.init(config=asdict(config))
    wandb.run.save()
    evaluate(env)
    actor, critic = torch.nn.Linear(11, 3), torch.nn.Linear(14, 1)
    actor_optimizer = torch.optim.Adam(actor.parameters())
    critic_optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    print("not to be seen")
    for update in range(1, config.updates + 1):
        seen.append({"config": config, "data": data, "update": update})
        rows = np.random.randint(len(data["rewards"]), size=config.batch_size)
        states, actions = (torch.as_tensor(data[name][rows]) for name in ("observations", "actions"))
        critic(torch.cat([states, actions], 1)).mean().backward()
        critic_optimizer.step()
        if update % 2 == 0:
            actor(states).mean().backward()
            actor_optimizer.step()
        wandb.log({"update": update}, step=update)
    wandb.finish()
"""


@pytest.fixture
def peer(tmp_path):
    """peer(text) is tmp_path/td3_bc.py with that text."""

    def write(text=PEER):
        (tmp_path / "td3_bc.py").write_text(text)
        return tmp_path / "td3_bc.py"

    yield write
    sys.modules.pop("peer", None)


def run(file, updates=10, batch_size=5):
    """Lets the peer make so many updates after its first."""

    def course():
        for _ in range(updates):
            yield
        raise peers.Measured

    return peers.Peer(file, batch_size, CPU, bench.random_episodes(count=3, length=40)).run(course())


@pytest.mark.parametrize("name", OFFLINE)
def test_every_script_updates_on_what_is_drawn_for_it(name):
    script = bench.load_script(name)
    sizes = {"hidden_dim": 8, "batch_size": 16, **SMALL}
    known = {field: value for field, value in sizes.items() if hasattr(script.Config, field)}
    config = dataclasses.replace(script.Config(), **known)
    learner = bench.new_learner(script, config, CPU)
    episodes = bench.random_episodes(count=3, length=40)
    speed = bench.run_updates(learner, bench.draw(script, learner, episodes, config), 3, CPU)
    assert learner.updates == 3
    assert speed > 0
    losses = {method for method in dir(learner) if method.endswith("_loss") or method == "target_q"}
    assert {*bench.compiled_methods(script)} == losses


@pytest.mark.parametrize("name", ["bc", "q_chunking", "trajectory_transformer"])
def test_actions_are_timed_whether_a_policy_remembers_plans_or_neither(name):
    script = bench.load_script(name)
    known = {field: value for field, value in SMALL.items() if hasattr(script.Config, field)}
    cost = bench.measure_actions(script, dataclasses.replace(script.Config(), **known), CPU, 2, 0.01)
    assert 0 < cost["ms a step"] <= cost["ms where it plans"]
    if name == "q_chunking":  # one step in five draws chunks
        assert cost["ms where it plans"] > 1.5 * cost["ms a step"]


# ---------------------------------------- Another folder's script ----------------------------------------


def test_a_peer_trains_by_its_own_loop_on_our_data_until_it_is_measured(peer, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())  # the real one, say
    before = {name: sys.modules.get(name) for name in ("d4rl", "gym", "wandb")}
    hooks = [*_global_optimizer_post_hooks]
    parameters = run(peer(), updates=10)
    seen = sys.modules["peer"].seen
    assert [each["update"] for each in seen] == list(range(1, 12))  # one for each yield after the first
    config = seen[0]["config"]
    assert (config.device, config.batch_size, config.num_workers, config.updates) == ("cpu", 5, 0, 1000)
    data, episodes = seen[0]["data"], bench.random_episodes(count=3, length=40)
    np.testing.assert_array_equal(data["observations"][79], episodes[1]["observations"][39])
    np.testing.assert_array_equal(data["next_observations"][79], episodes[1]["observations"][40])
    np.testing.assert_array_equal(data["actions"][80], episodes[2]["actions"][0])
    np.testing.assert_array_equal(data["rewards"], np.concatenate([each["rewards"] for each in episodes]))
    assert [*np.flatnonzero(data["terminals"])] == [*np.flatnonzero(data["timeouts"])] == [39, 79, 119]
    assert parameters == (11 * 3 + 3) + (14 + 1)
    assert before == {name: sys.modules.get(name) for name in before}
    assert hooks == [*_global_optimizer_post_hooks]
    assert capsys.readouterr() == ("", "")


def test_steps_of_others_are_no_updates_of_the_peer(peer):
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.ones(1000)
    other = torch.optim.Adam([weight])

    def course():
        for _ in range(4):
            other.step()
            yield
        raise peers.Measured

    ours = peers.Peer(peer(), 5, CPU, bench.random_episodes(count=3, length=40))
    assert ours.run(course()) == (11 * 3 + 3) + (14 + 1)
    assert len(sys.modules["peer"].seen) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("import torch\n", "import torch, jaxlib_of_nobody\n"), "No module named 'jaxlib_of_nobody'"),
        (("def train(", "def main("), "no function `train` of one dataclass"),
        (("config: TrainConfig", "config"), "no function `train` of one dataclass"),
        (("    batch_size: int = 7\n", ""), "its settings have no batch_size"),
        (("updates: int = 1000", "updates: int = 5"), "training ended before it was measured"),
        (('print("not to be seen")', "d4rl.set_dataset_path('/x')"), "no attribute 'set_dataset_path'"),
        (('print("not to be seen")', "raise SystemExit(2)"), "SystemExit: 2"),
    ],
)
def test_what_a_peer_lacks_is_said_in_a_line(peer, change, message):
    assert change[0] in PEER
    file = peer(PEER.replace(*change))
    with pytest.raises(peers.UserError) as raised:
        run(file)
    assert str(raised.value).startswith(f"{file}: ")
    assert message in str(raised.value)


def test_turns_alternate_and_the_peer_answers_for_its_own_time_alone(peer, monkeypatch):
    """By a clock that the learners move: 10 ms an update of the peer's, 2 s a turn of ours."""
    clock = SimpleNamespace(now=0.0, precisions=[])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(sys, "clock_of_test", clock, raising=False)
    step, clocks = "critic_optimizer.step()", "sys.clock_of_test"
    moved = f"{clocks}.now += 0.01; {clocks}.precisions.append(torch.get_float32_matmul_precision())"
    file = peer("import sys\n" + PEER.replace(step, f"{step}; {moved}"))
    order = []

    class Entrant:
        def __init__(self, script, config, device, episodes):
            self.config = config
            self.learner = SimpleNamespace(optimizer=torch.optim.Adam([torch.zeros(50, requires_grad=True)]))
            torch.set_float32_matmul_precision(config.precision)

        def take_turn(self, seconds):
            order.append((self.config.precision, len(sys.modules["peer"].seen)))
            torch.set_float32_matmul_precision(self.config.precision)
            clock.now += 2
            return 40.0

    monkeypatch.setattr(bench, "Entrant", Entrant)
    script = bench.load_script("td3_bc")
    configs = {each: dataclasses.replace(script.Config(), precision=each) for each in ("highest", "medium")}
    speeds, columns = bench.measure_beside(file, script, configs, CPU, turns=3, seconds=0.5)
    torch.set_float32_matmul_precision("highest")
    assert {*speeds} == {"peer", "highest", "medium"}
    np.testing.assert_allclose(speeds["peer"], [100, 100, 100])
    assert speeds["medium"] == [40, 40, 40]
    turns = [1 + bench.WARM_UP + each * 50 for each in (1, 2, 3)]  # 50 updates of 10 ms
    assert [precision for precision, _ in order] == ["highest", "medium"] * 3
    np.testing.assert_allclose([updates for _, updates in order], np.repeat(turns, 2), atol=2)  # rounded sums
    assert {*clock.precisions} == {"highest"}
    assert columns == {"M parameters": 50e-6, "peer's": 51e-6}


def test_a_script_is_found_by_its_name_and_bc_by_corls(tmp_path):
    (tmp_path / "any_percent_bc.py").touch()
    (tmp_path / "iql.py").touch()
    assert peers.find_script(tmp_path, "iql") == tmp_path / "iql.py"
    assert peers.find_script(tmp_path, "bc") == tmp_path / "any_percent_bc.py"
    assert peers.find_script(tmp_path, "cql") is None
    (tmp_path / "bc.py").touch()
    assert peers.find_script(tmp_path, "bc") == tmp_path / "bc.py"


# -------------------------------------------- The command line --------------------------------------------


@pytest.fixture
def program(monkeypatch, capsys):
    """program("td3_bc", ...) is that command line here, its measurements made up: status, stdout, stderr."""

    def measured(name, place, value, arguments):
        speeds = {"eager": [1.0, 2.0, 30.0], "compiled": [2.0, 5.0, 60.0], "medium": [4.0, 4.0, 90.0]}
        if arguments.peer:
            return (
                None
                if name == "cql"
                else {"speeds": {"peer": [1.0, 2.0, 10.0]} | speeds, "columns": {"M": 0.2}}
            )
        if arguments.sweep:
            speed, work = 100 / float(value), 3 * float(value)
            return {"speeds": {"compiled": [speed]}, "columns": {"peak MiB": 512, "M multiply-adds": work}}
        return {"speeds": speeds, "columns": {}}

    monkeypatch.setattr(bench, "measure_in_child", measured)
    monkeypatch.setattr(bench, "measure_evaluation", lambda turns: 0.125)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
        status = bench.exit_status("bench.py", bench.main)
        return status, *capsys.readouterr()

    return call


def table(out):
    """Of the lines after the heading: a dict for each row."""
    names = {"M multiply-adds": "work", "G multiply-adds/s": "rate", "peak MiB": "peak", " x": "_x"}
    header, *rows = [line for line in out.splitlines() if "device:threads" in line or " cpu:" in line]
    for long, short in names.items():
        header = header.replace(long, short)
    return [dict(zip(header.split(), row.split(), strict=True)) for row in rows]


def test_ratios_are_of_turns_of_one_round(program):
    status, out, err = program("td3_bc", "--places", "cpu:1")
    assert (status, err) == (0, "")
    (row,) = table(out)
    assert (row["script"], row["device:threads"]) == ("td3_bc", "cpu:1")
    assert (row["eager"], row["compiled"], row["medium"]) == ("2.00", "5.00", "4.00")
    assert row["compiled/eager"] == "2.00"  # of 2, 2.5 and 2
    assert row["medium/eager"] == "3.00"  # of 4, 2 and 3
    assert "0.125 ms per environment step" in out


def test_beside_a_peer_all_that_it_has_is_measured_and_what_fails_costs_the_status(program, tmp_path):
    for name in ("any_percent_bc", "td3_bc", "cql", "setup"):
        (tmp_path / f"{name}.py").touch()
    status, out, _ = program("--peer", tmp_path, "--places", "cpu:2")
    assert status == 2  # cql's failed
    assert [row["script"] for row in table(out)] == ["bc", "td3_bc"]
    assert table(out)[0]["compiled/peer"] == "2.50"  # of 2, 2.5 and 6
    assert program("td3_bc", "--peer", tmp_path, "--places", "cpu:2")[0] == 0


def test_a_sweep_holds_time_against_work(program):
    status, out, err = program("sac_n", "--sweep", "critics", 2, 10, "--places", "cpu:1")
    assert (status, err) == (0, "")
    first, second = table(out)
    assert (first["critics"], first["ms"], first["work"], first["rate"]) == ("2.00", "20", "6.00", "0.30")
    assert (second["critics_x"], second["work_x"], second["ms_x"]) == ("5.00", "5.00", "5.00")
    assert second["peak"] == "512"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense: not one of awac, "),
        (["td3_bc", "--peer", "/nowhere"], "--peer /nowhere: no such folder"),
        (["td3_bc", "--peer", ROOT / "docs"], f"td3_bc: no script of this name in {ROOT / 'docs'}"),
        (["--peer", ROOT / "docs"], f"no script of this name in {ROOT / 'docs'}"),
        (["nonsense", "--sweep", "critics", "2"], "nonsense: not one of awac, "),
        (["td3_bc", "sac_n", "--sweep", "critics", "2"], "td3_bc: no critics among its settings"),
        (["td3_bc", "--sweep", "batch_size"], "a field and numbers above 0 are wanted"),
        (["td3_bc", "--sweep", "batch_size", "256", "many"], "a field and numbers above 0 are wanted"),
        (["td3_bc", "--sweep", "batch_size", "0"], "a field and numbers above 0 are wanted"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(program, arguments, message):
    status, out, err = program(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("bench.py: ")
    assert err.count("\n") == 1
    assert message in err


# -------------------------------------------- Work and memory --------------------------------------------


def test_work_is_the_products_of_an_update():
    """TD3+BC's by hand, of a hidden layer: a product forward, one for weights, one for what lies below."""
    script = bench.load_script("td3_bc")
    config = dataclasses.replace(script.Config(), hidden_dim=8, hidden_layers=1, batch_size=16)
    per_row = {"actor": 11 * 8 + 8 * 3, "critic": 2 * 14 * 8}  # its last layer is a sum, not a product
    target = per_row["actor"] + per_row["critic"]
    critic = 2 * per_row["critic"]  # forward, weights
    actor = 2 * per_row["actor"] + 8 * 3 + 14 * 8 + 14 * 8  # ..., hidden units; through one critic and back
    expected = 16 * (target + critic + actor / 2) / 1e6  # the actor's every second update
    assert bench.multiply_adds(script, config, CPU) == pytest.approx(expected)


def test_peak_memory_is_what_the_process_once_took():
    held = torch.ones(2**25)  # 128 MiB
    mebibytes = psutil.Process().memory_info().rss / 2**20
    del held
    assert 0.9 * mebibytes < bench.peak_memory(CPU) < 100 * mebibytes
