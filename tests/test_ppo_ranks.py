"""Two processes under torchrun train like one process with all environments."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from gymnasium.spaces import Discrete

import ppo

pytestmark = pytest.mark.slow

FLAGS = {"num_minibatches": 4, "update_epochs": 2, "ent_coef": 0.1, "max_grad_norm": 0.5,
         "norm_obs": False}
HALVES = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import ppo
dist.init_process_group("gloo")
rank = dist.get_rank()
agent, batch, permutations = torch.load({path!r}, weights_only=False)
# Each process has every second row: the same minibatches, half of each.
half = {{name: column[rank::2] for name, column in batch.items()}}
orders = iter(permutations)
torch.randperm = lambda *args, **kwargs: next(orders)
_, mean, var = ppo.moments(half["advantage"])
half["advantage"] = (half["advantage"] - mean) / (var.sqrt() + 1e-8)
optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2, eps=1e-5)
args = ppo.Args(**{flags}, target_kl={target_kl})
learner = torch.nn.parallel.DistributedDataParallel(agent)
metrics = ppo.update(learner, optimizer, half, args)
moments = ppo.RunningMoments((3,))
moments.update(half["obs"])
moments.update(half["obs"] * 3)
gathered = ppo.all_gather(half["target"])
torch.save((agent.state_dict(), moments.state_dict(), gathered, metrics), {path!r} + str(rank))
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort a process at exit
"""


def torchrun(*command):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run([*run, *map(str, command)], capture_output=True, text=True, timeout=240,
                          check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target_kl", [None, 0.003])
def test_two_processes_get_the_weights_of_one(tmp_path, target_kl, monkeypatch):
    torch.manual_seed(0)
    agent, num_rows = ppo.Agent((3,), Discrete(2), ppo.Args(**FLAGS)), 64
    obs, action = torch.randn(num_rows, 3), torch.randint(2, (num_rows, 1))
    batch = {"obs": obs, "action": action, "logprob": agent(obs)[0].log_prob(action).detach(),
             "advantage": torch.randn(num_rows) + 1, "target": torch.randn(num_rows)}
    orders = [torch.randperm(num_rows // 2) for _ in range(2)]
    path = str(tmp_path / "given.pt")
    torch.save((agent, batch, orders), path)
    script = tmp_path / "halves.py"
    script.write_text(HALVES.format(root=str(ROOT), path=path, flags=FLAGS, target_kl=target_kl))
    torchrun(script)
    (first, scale, gathered, metrics), (second, scale2, _, _) = (
        torch.load(path + rank, weights_only=True) for rank in "01")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between the processes"
    assert all(torch.equal(tensor, scale2[name]) for name, tensor in scale.items())

    # One process: minibatch k has rows 2i and 2i + 1; each of two processes has row i.
    whole = iter([torch.stack([2 * order, 2 * order + 1], 1).flatten() for order in orders])
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: next(whole))
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2, eps=1e-5)
    advantage = batch["advantage"]
    batch["advantage"] = (advantage - advantage.mean()) / advantage.std(correction=0)
    alone = ppo.update(agent, optimizer, batch, ppo.Args(**FLAGS, target_kl=target_kl))
    for name, tensor in agent.state_dict().items():
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    # The other metrics are those of the process's own rows.
    torch.testing.assert_close(metrics["grad_norm"], alone["grad_norm"], atol=1e-5, rtol=1e-4)
    moments = ppo.RunningMoments((3,))
    moments.update(obs)
    moments.update(obs * 3)
    for name in ("count", "mean", "var"):
        torch.testing.assert_close(scale[name], getattr(moments, name), atol=1e-6, rtol=1e-5)
    assert gathered == batch["target"][0::2].tolist() + batch["target"][1::2].tolist()


DECIDE = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import ppo
dist.init_process_group("gloo")
rank = dist.get_rank()
agent, obs = torch.load({path!r}, weights_only=False)
action = torch.zeros(len(obs), 1, dtype=torch.long)
logprob = agent(obs)[0].log_prob(action).detach()
# log r is 0 in process 0 and -0.3 in process 1, so the KL estimates are 0 and 0.041.
batch = dict(obs=obs, action=action, logprob=logprob + 0.3 * rank, advantage=torch.ones(len(obs)),
             target=torch.zeros(len(obs)))
learner = torch.nn.parallel.DistributedDataParallel(agent)
optimizer, weights = torch.optim.SGD(agent.parameters(), lr=1e-2), []
for limit in (0.01, 0.03):
    args = ppo.Args(num_minibatches=1, update_epochs=1, target_kl=limit / 1.5)
    ppo.update(learner, optimizer, batch, args)
    weights.append(torch.cat([param.detach().flatten() for param in agent.parameters()]))
torch.save(weights, {path!r} + str(rank))
dist.barrier()
os._exit(0)
"""


def test_processes_decide_together_whether_the_kl_is_too_large(tmp_path):
    """The mean of both, 0.02, decides: no step with the first limit, one with the second."""
    agent = ppo.Agent((3,), Discrete(2), ppo.Args())
    path = str(tmp_path / "given.pt")
    torch.save((agent, torch.randn(8, 3)), path)
    (tmp_path / "decide.py").write_text(DECIDE.format(root=str(ROOT), path=path))
    torchrun(tmp_path / "decide.py")
    first, second = (torch.load(path + rank, weights_only=True) for rank in "01")
    before = torch.cat([param.detach().flatten() for param in agent.parameters()])
    for stopped, stepped in (first, second):
        assert torch.equal(stopped, before) and not torch.equal(stepped, before)
    assert torch.equal(first[1], second[1])


SPY = """
import os, sys, torch
sys.path.insert(0, {root!r})
import ppo
write, collect, actions, seen = ppo.Logger.write, ppo.collect, [], []
def spy(log, *args, **metrics):
    write(log, *args, **metrics)
    weights = torch.cat([p.detach().flatten() for p in log.parts["agent"].state_dict().values()])
    seen.append((weights, log.step, log.score))
def watch(*args):
    out = collect(*args)
    actions.append((out[2]["obs"], out[2]["action"]))
    return out
ppo.Logger.write, ppo.collect = spy, watch
sys.argv = ["ppo.py", *sys.argv[1:]]
ppo.train(ppo.parse_args())
torch.save((seen, actions), {path!r} + os.environ["RANK"])
"""


def test_run_of_two_processes(tmp_path):
    """Weights and score are equal, episodes and actions differ, one process writes, both resume."""
    path, script = str(tmp_path / "seen"), tmp_path / "spy.py"
    script.write_text(SPY.format(root=str(ROOT), path=path))
    flags = ["--num-envs", 8, "--num-minibatches", 2]
    for extra in (["--run-dir", tmp_path / "run", "--total-timesteps", 1024, "--eval-episodes", 2],
                  ["--resume", tmp_path / "run", "--total-timesteps", 1536]):
        out = torchrun(script, *flags, *extra)
        assert out.count("files in") == 1 and out.count("greedy evaluation") == 1
        (seen, played), (seen2, played2) = (torch.load(path + r, weights_only=True) for r in "01")
        for ours, theirs in zip(seen, seen2, strict=True):
            assert torch.equal(ours[0], theirs[0]) and ours[1:] == theirs[1:]
        for ours, theirs in zip(played, played2, strict=True):
            assert ours[0].shape == (32, 4, 4)
            assert not torch.equal(ours[0], theirs[0]) and not torch.equal(ours[1], theirs[1])
    assert seen[-1][1] == 1536
    assert sorted(os.listdir(tmp_path / "run")) == ["args.json", "checkpoint.pt", "metrics.csv"]
    steps = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in steps] == [256, 512, 768, 1024, 1280, 1536]


def test_environments_that_do_not_divide():
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run([*run, "ppo.py", "--num-envs", "3"], capture_output=True, text=True,
                          timeout=240, check=False, cwd=ROOT)
    assert done.returncode != 0 and "--num-envs 3: not divisible by 2" in done.stderr
