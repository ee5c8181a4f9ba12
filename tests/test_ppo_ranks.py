"""Two processes under torchrun are one of twice the size."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import ppo

pytestmark = pytest.mark.slow

HALVES = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import ppo
dist.init_process_group("gloo")
rank = dist.get_rank()
agent, batch, rows = torch.load({path!r}, weights_only=False)
batch = ppo.Batch(*batch)
rows = [part.chunk(2)[rank] for part in rows]
ppo.minibatches = lambda *args: iter(rows)
mine = torch.cat(rows[: len(rows) // 2])
advantage = torch.zeros(len(batch.obs))
advantage[mine] = ppo.normalize(batch.advantage[mine])
optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2, eps=1e-5)
args = ppo.Args(num_minibatches=4, update_epochs=2, ent_coef=0.1, max_grad_norm=0.5,
                target_kl={target_kl})
report = ppo.update(agent, optimizer, batch._replace(advantage=advantage), ppo.objective, 0.2, args)
normalizer = ppo.Normalizer((3,))
normalizer.update(batch.obs[mine])
normalizer.update(batch.obs[mine] * 3)
total = ppo.gather(batch.target[mine])
torch.save((agent.state_dict(), normalizer.state_dict(), total, report), {path!r} + str(rank))
dist.barrier()
os._exit(0)  # gloo's threads now and then abort a process that takes leave in order
"""


def torchrun(*command):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run([*run, *map(str, command)], capture_output=True, text=True, timeout=240,
                          check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("target_kl", [None, 0.003])
def test_halves_of_each_minibatch_give_the_weights_of_the_whole(tmp_path, target_kl):
    torch.manual_seed(0)
    agent, num_rows = ppo.Agent((3,), [2], 1), 64
    obs, action = torch.randn(num_rows, 3), torch.randint(2, (num_rows, 1))
    logprob, _, value = (column.detach() for column in agent(obs, action))
    batch = ppo.Batch(obs, action, logprob, value, torch.randn(num_rows) + 1, torch.randn(num_rows))
    rows = list(torch.randperm(num_rows).chunk(4))
    rows += [part[torch.randperm(16)] if target_kl else part for part in rows]
    rows[4:] = [torch.cat([part.chunk(2)[0], part.chunk(2)[1]]) for part in rows[:4]]
    path = str(tmp_path / "given.pt")
    torch.save((agent, batch, rows), path)
    script = tmp_path / "halves.py"
    script.write_text(HALVES.format(root=str(ROOT), path=path, target_kl=target_kl))
    torchrun(script)
    (first, scale, total, report), (second, scale2, _, _) = (
        torch.load(path + rank, weights_only=True) for rank in "01")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between the ranks"
    assert all(torch.equal(tensor, scale2[name]) for name, tensor in scale.items())

    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2, eps=1e-5)
    args = ppo.Args(num_minibatches=4, update_epochs=2, ent_coef=0.1, max_grad_norm=0.5,
                    target_kl=target_kl)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "minibatches", lambda *args: iter(rows))
        whole = batch._replace(advantage=ppo.normalize(batch.advantage))
        alone = ppo.update(agent, optimizer, whole, ppo.objective, 0.2, args)
    for name, tensor in agent.state_dict().items():
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    for name in alone:
        torch.testing.assert_close(report[name], alone[name], atol=1e-5, rtol=1e-4, msg=name)
    normalizer = ppo.Normalizer((3,))
    normalizer.update(obs)
    normalizer.update(obs * 3)
    for name, tensor in normalizer.state_dict().items():
        torch.testing.assert_close(scale[name], tensor, atol=1e-6, rtol=1e-5)
    assert sorted(total.tolist()) == pytest.approx(sorted(batch.target.tolist()))


SPY = """
import sys, torch
sys.path.insert(0, {root!r})
import ppo
log, actions, seen = ppo.Run.log, [], []
def spy(run, *args, **means):
    log(run, *args, **means)
    weights = torch.cat([p.detach().flatten() for p in run.parts["agent"].state_dict().values()])
    seen.append((weights, run.step, run.score))
rollout = ppo.rollout
def watch(*args):
    out = rollout(*args)
    actions.append(out[1]), seen.append(out[0])
    return out
ppo.Run.log, ppo.rollout = spy, watch
sys.argv = ["ppo.py", *sys.argv[1:]]
ppo.train(ppo.parse(ppo.Args))
torch.save((seen, actions), {path!r} + ppo.os.environ["RANK"])
"""


def test_a_real_run_of_two_ranks(tmp_path):
    """The same weights and score to the bit, other episodes and actions; one writes; resume."""
    path, script = str(tmp_path / "seen"), tmp_path / "spy.py"
    script.write_text(SPY.format(root=str(ROOT), path=path))
    flags = ["--num-envs", 8, "--num-minibatches", 2, "--norm-obs", "True", "--norm-reward", "True"]
    for extra in (["--run-dir", tmp_path / "run", "--total-timesteps", 1024, "--eval-episodes", 2],
                  ["--resume", tmp_path / "run", "--total-timesteps", 1536]):
        out = torchrun(script, *flags, *extra)
        assert out.count("files in") == 1 and out.count("evaluation:") == 1
        assert out.count("process(es)") == ("--resume" not in extra), "it has its settings already"
        (seen, actions), (seen2, actions2) = (torch.load(path + r, weights_only=True) for r in "01")
        for ours, theirs in zip(seen, seen2):
            if isinstance(ours, tuple):
                assert torch.equal(ours[0], theirs[0]) and ours[1] == theirs[1]
                assert ours[2] == theirs[2] or ours[2] != ours[2]
            else:
                assert ours.shape == (33, 4, 4) and not torch.equal(ours[0], theirs[0])
        assert not torch.equal(actions[0], actions2[0])
    assert seen[-1][1] == 1536
    assert sorted(os.listdir(tmp_path / "run")) == ["args.json", "checkpoint.pt", "metrics.csv"]
    steps = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in steps] == [256, 512, 768, 1024, 1280, 1536]
