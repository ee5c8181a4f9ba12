"""docs/copy.md: every change is made in a copy of the script, which then runs."""

import importlib.util
import itertools
import json
import re
import subprocess
import sys

import gymnasium as gym
import pytest
import test_decoder
import test_reinforce
import tokenizers
import torch
import transformers
from conftest import ROOT
from test_reinforce import double  # noqa: F401

import dpo
import grpo

PAGE = (ROOT / "docs" / "copy.md").read_text()
CHANGES = dict(re.findall(r"<!-- change (\w+) -->\n```diff\n(.*?)```", PAGE, re.DOTALL))
GPT = ["--pretrain-steps", "5", "--max-steps", "2", "--eval-prompts", "8"]


def changed(name, folder):
    """Write a copy of the script with the change into the folder; return its name.

    Parts of a change are separated by @@. Lines that begin with a space stay.
    """
    script, *lines = CHANGES[name].splitlines()
    script = script.removeprefix("--- ")
    source = (ROOT / script).read_text()
    for hunk in "\n".join(lines).removeprefix("@@\n").split("\n@@\n"):
        old = "\n".join(line[1:] for line in hunk.split("\n") if not line.startswith("+"))
        new = "\n".join(line[1:] for line in hunk.split("\n") if not line.startswith("-"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    assert max(map(len, source.splitlines())) <= 100
    (folder / script).write_text(source)
    return script


def run(folder, *command):
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(path):
    """Import a script of another folder under a name of its own."""
    spec = importlib.util.spec_from_file_location("changed_copy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example(name):
    return re.search(rf"<!-- example {name} -->\n```python\n(.*?)```", PAGE, re.DOTALL)[1]


def test_every_change_is_tested():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_copy*.py"))
    assert set(CHANGES) == set(re.findall(r'changed\("(\w+)"', tests))


@pytest.fixture
def my_envs(tmp_path, monkeypatch):
    """Write my_envs.py of the page into a folder from which it can be imported."""
    parts = re.findall(r"<!-- file my_envs.py -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(parts) == 3
    (tmp_path / "my_envs.py").write_text("\n\n".join(parts))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_envs", raising=False)
    yield tmp_path
    for name in [name for name in gym.registry if "orridor" in name or "Moon" in name]:
        del gym.registry[name]


def test_own_environment_in_a_folder_with_the_script(my_envs):
    (my_envs / "ppo.py").write_text((ROOT / "ppo.py").read_text())
    run(my_envs, "ppo.py", "--env-id", "my_envs:Corridor-v0", "--total-timesteps", "20480",
        "--run-dir", "run")
    *_, last = (my_envs / "run" / "metrics.csv").read_text().splitlines()
    assert -7 < float(last.split(",")[2]) <= -5, "five steps to the right, each costs 1"


@pytest.mark.parametrize("env_id, best", [("LongCorridor-v0", -10), ("ScaledCorridor-v0", -0.5)])
@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_keyword_arguments_and_wrappers(name, env_id, best, my_envs, capsys):
    script = importlib.import_module(name)
    script.train(script.Args(env_id=f"my_envs:{env_id}", total_timesteps=60_000, stop_at=1.2 * best,
                             eval_episodes=4, run_dir=str(my_envs / "run")))
    assert f"greedy evaluation: mean return {best:.1f} in" in capsys.readouterr().out


def test_registered_arguments_and_limits(my_envs):
    assert gym.make("my_envs:MoonPendulum-v0").unwrapped.g == 1.62
    env = gym.make("my_envs:ScaledCorridor-v0")
    assert env.spec.max_episode_steps == 100
    env.reset()
    assert [env.step(0)[3] for _ in range(100)] == [False] * 99 + [True]


def test_own_network(tmp_path):
    script = imported(tmp_path / changed("network", tmp_path))
    agent, _ = script.train(script.Args(total_timesteps=4_096, run_dir=str(tmp_path / "run")))
    for net, outputs in (agent.actor, 2), (agent.critic, 1):
        assert [layer.out_features for layer in net[::2]] == [256, 256, outputs]


def test_value_clipping(tmp_path):
    """The value's gradient is 0 where it has moved towards the target by more than epsilon."""
    script = imported(tmp_path / changed("vclip", tmp_path))
    script.train(script.Args(total_timesteps=4_096, run_dir=str(tmp_path / "run")))
    agent = script.Agent((3,), gym.spaces.Discrete(2), script.Args(norm_obs=False))
    obs, action = torch.randn(8, 3), torch.zeros(8, 1, dtype=torch.long)
    pi, value = agent(obs)
    batch = {"obs": obs, "action": action, "logprob": pi.log_prob(action).detach(),
             "advantage": torch.zeros(8)}
    for old, target, moves in ((-0.5, 0.5, False), (-0.1, 0.5, True), (-0.5, -1.5, True)):
        shift = {"value": value.detach() + old, "target": value.detach() + target}
        args = script.Args(num_minibatches=1, update_epochs=1, ent_coef=0.0, clip_coef=0.2)
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
        script.update(agent, optimizer, batch | shift, args)
        gradient = torch.cat([param.grad.flatten() for param in agent.critic.parameters()])
        assert bool(gradient.any()) == moves


def test_off_policy_reinforce_runs(tmp_path):
    script = imported(tmp_path / changed("offpolicy", tmp_path))
    script.train(
        script.Args(total_timesteps=3_000, eval_episodes=2, run_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_off_policy_reinforce_is_exact(gamma, tmp_path, monkeypatch, double):  # noqa: F811
    """With epsilon 1 the actions are uniform, so the mean over all trajectories is E_b."""
    script = imported(tmp_path / changed("offpolicy", tmp_path))
    monkeypatch.setattr(script, "EPSILON", 1.0)
    policy, _ = test_reinforce.train_on_all_trajectories(
        script, monkeypatch, on_policy=False, gamma=gamma)
    test_reinforce.assert_gradient_is_exact(policy, gamma)


@pytest.mark.parametrize("right, wrong", [
    ("(pi / b).cumprod(0)", "pi / b"), ("(pi / b).cumprod(0)", "(b / pi).cumprod(0)"),
    ("EPSILON / envs.single_action_space.n", "EPSILON"),
    ("with torch.no_grad():\n                pi", "if True:\n                pi"),
], ids=["one ratio", "upside down", "not divided", "gradient through the ratio"])
def test_broken_off_policy_reinforce_is_not_exact(
        right, wrong, tmp_path, monkeypatch, double):  # noqa: F811
    path = tmp_path / changed("offpolicy", tmp_path)
    assert path.read_text().count(right) == 1
    path.write_text(path.read_text().replace(right, wrong))
    script = imported(path)
    monkeypatch.setattr(script, "EPSILON", 1.0)
    policy, _ = test_reinforce.train_on_all_trajectories(script, monkeypatch, on_policy=False)
    with pytest.raises(AssertionError):
        test_reinforce.assert_gradient_is_exact(policy, 1.0)


def test_behavior_policy_is_the_stated_mixture(tmp_path):
    script = imported(tmp_path / changed("offpolicy", tmp_path))
    script.EPSILON = 0.4
    envs = script.make_envs("CartPole-v1", 4_000, 0)
    torch.manual_seed(0)
    policy = script.Policy(envs.single_observation_space, envs.single_action_space)
    with torch.no_grad():
        policy.net[-1].bias.copy_(torch.tensor([5.0, -5.0]))  # π(0) is nearly 1
    batch = script.play_episodes(envs, policy, 1, "cpu")
    assert (batch["action"] == 0).float().mean().item() == pytest.approx(0.8, abs=0.02)


def test_table_has_the_second_moments_of_the_ratios():
    """The second moment, summed over all sequences of actions for few steps and by formula."""
    table = re.findall(r"^\| (10+|500) \| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE)
    assert [int(row[0]) for row in table] == [10, 100, 500]
    for column, epsilon in enumerate((0.1, 0.2, 0.5), 1):
        pi = torch.tensor([0.9, 0.1], dtype=torch.float64)
        b = (1 - epsilon) * pi + epsilon / 2
        factor = (pi**2 / b).sum()
        paths = torch.tensor(list(itertools.product(range(2), repeat=10)))
        product = (pi[paths] / b[paths]).prod(1)
        torch.testing.assert_close((b[paths].prod(1) * product).sum(), torch.ones_like(factor))
        torch.testing.assert_close((b[paths].prod(1) * product**2).sum(), factor**10)
        for row in table:
            assert row[column] == f"{factor.item() ** int(row[0]):.3g}"


@pytest.mark.parametrize("env_id", [
    "CartPole-v1", "Pendulum-v1", "scripted:Does-from5-v0", "scripted:Does-table-v0",
    "scripted:Sees-gray-v0"])
def test_saved_weights_load_in_three_lines(env_id, tmp_path, monkeypatch):
    import reinforce

    monkeypatch.chdir(tmp_path)
    reinforce.train(reinforce.Args(env_id, total_timesteps=500, run_dir="runs/mine"))
    envs = gym.make_vec(env_id, 1)
    obs, _ = envs.reset(seed=0)
    names = vars(reinforce) | {"envs": envs, "obs": obs}
    exec(example("weights"), names)
    assert envs.action_space.contains(names["action"])
    envs.step(names["action"])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_ppo_checkpoint_loads_as_shown(env_id, tmp_path, monkeypatch):
    import ppo

    monkeypatch.chdir(tmp_path)
    agent, _ = ppo.train(ppo.default_args(
        env_id, total_timesteps=2_048, norm_obs=env_id == "CartPole-v1", run_dir="runs/mine"))
    names = {"ppo": ppo, "torch": torch}
    exec(example("checkpoint"), names)
    assert names["reward"].shape == (1,)
    for old, new in zip(agent.state_dict().values(), names["agent"].state_dict().values()):
        assert torch.equal(old, new)


@pytest.mark.slow
def test_own_reward(tmp_path):
    """As many points as sevens: more than one is possible, and nothing else could give them."""
    script = changed("reward", tmp_path)
    run(tmp_path, script, *GPT, "--max-steps", "25", "--pretrain-steps", "60", "--run-dir", "run")
    header, first, *_, last = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("reward")
    assert float(last.split(",")[column]) > float(first.split(",")[column]) + 0.5


def test_the_countdown_reward():
    text = (ROOT / "docs" / "copy.md").read_text()
    code = re.search(r"<!-- example countdown -->\n```python\n(.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(code, names)
    example = {"numbers": [3, 5, 2], "target": 16}

    def reward(completion):
        return names["countdown_reward"](completion, example)

    assert reward("(3+5)*2") == reward("I think:\n 2 * (5 + 3) ") == 1
    assert names["countdown_reward"]("5/2", {"numbers": [5, 2], "target": 2.5}) == 1
    for wrong in ("(3+5)*3", "8*2", "3+5", "", "(3+5)*2 = 16", "__import__('os')", "2**4", "16",
                  "1//1", "((3+5)*2", "3/0", "98**44**35**19", "(" * 50 + "2" + ")" * 49,
                  "٣+5", "-(-16)", "(3+5)*2" + " " * 10_000 + "x", "()", "5 3"):
        assert reward(wrong) == 0, wrong


def test_gsm8k_becomes_prompts_with_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"question": "Tom has 2 apples and buys 3. How many has he?",
           "answer": "Tom has 2+3=<<2+3=5>>5 apples.\n#### 5"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    exec(example("gsm8k"), {})
    (made,) = map(json.loads, (tmp_path / "questions.jsonl").read_text().splitlines())
    assert made["prompt"][0]["content"].startswith(row["question"])
    assert grpo.default_reward("2 + 3 = 5\n#### 5", made) == 1
    assert grpo.default_reward("#### 6", made) == 0


def test_datasets_writes_pairs_that_dpo_reads(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    rows = json.loads((ROOT / "tests/data/pairs_prompt_and_conversations.json").read_text())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    exec(example("ultrafeedback"), {})
    found = dpo.read_rows(tmp_path / "pairs.jsonl", dpo.split_row, False)
    assert found == [dpo.split_row(row) for row in rows] and len(found) == 2


@pytest.fixture
def digits(tmp_path):
    """A model folder whose tokens are the characters of sums; returns its parent."""
    test_decoder.write(tmp_path / "FOLDER", "llama")
    vocabulary = {symbol: i for i, symbol in enumerate(["<end>", *"0123456789+= "])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.save(str(tmp_path / "FOLDER" / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (tmp_path / "FOLDER" / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<end>", "chat_template": template}))
    return tmp_path


@pytest.mark.slow
def test_own_data(digits):
    """The rows of the page, with other prompts."""
    text = (ROOT / "docs" / "copy.md").read_text()
    rows = re.findall(r"^\| `(\w+\.py)` \| `(\{.*\})` \|$", text, re.MULTILINE)
    assert [script for script, _ in rows] == ["grpo.py"] * 2 + ["dpo.py"] * 2
    flags = {"grpo.py": ["--max-completion-length", "8"], "dpo.py": []}
    for number, (script, row) in enumerate(rows):
        row = json.loads(row)
        lines = []
        for n in range(20):
            prompt = f"{n:02}+03="
            if isinstance(row["prompt"], list):
                prompt = [row["prompt"][0] | {"content": prompt}]
            lines.append(json.dumps(row | {"prompt": prompt}))
        (digits / "data.jsonl").write_text("\n".join(lines))
        (digits / script).write_text((ROOT / script).read_text())
        run(digits, script, "--model", "FOLDER", "--data", "data.jsonl", "--max-steps", "2",
            "--batch-size", "2", "--run-dir", f"run-{number}", *flags[script])


@pytest.mark.slow
def test_several_rewards_and_own_columns(digits, monkeypatch):
    """The code of the page, with fewer and shorter completions."""
    monkeypatch.chdir(digits)
    page = (ROOT / "docs" / "copy.md").read_text()
    row = json.loads(re.search(r'^\{"prompt": .*"word".*\}$', page, re.MULTILINE)[0])
    rows = [row | {"prompt": f"{n}+1=", "word": str(n)} for n in range(30)]
    (digits / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"batch_size": 2, "max_steps": 2, "max_completion_length": 6, "device": "cpu",
             "run_dir": str(digits / "run")}
    default_args, names = grpo.default_args, {}
    monkeypatch.setattr(grpo, "default_args", lambda *args, **more: default_args(
        *args, **small | more))
    exec(example("rewards"), names)
    assert names["reward"]("a tree 7", row) == 1.5 and names["reward"]("7 " * 13, row) == 0
    transcripts = [json.loads(line) for line in (digits / "run" / "transcripts.jsonl").open()]
    assert transcripts and all(each["reward"] in (0, 0.5, 1, 1.5) for each in transcripts)


def test_adapters_can_be_merged(digits, monkeypatch):
    """A third of the difference between the model and its export."""
    args = grpo.default_args(str(digits / "FOLDER"), lora_rank=2, device="cpu")
    model = grpo.make_model(*grpo.load_model(args)[:2], torch.device("cpu"), args)
    for name, param in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(param)
    base = transformers.AutoModelForCausalLM.from_pretrained(digits / "FOLDER")
    before = {name: param.clone() for name, param in base.named_parameters()}
    grpo.save_model(digits / "merged", model, grpo.load_model(args)[2])
    merged = transformers.AutoModelForCausalLM.from_pretrained(digits / "merged")
    monkeypatch.setattr(grpo, "load_checkpoint", lambda folder: {"model": {
        name: param.detach() for name, param in model.named_parameters() if "lora_" in name}})
    exec(example("merge"), {"grpo": grpo, "model": base})
    changed = 0
    for name, param in merged.named_parameters():
        third = before[name] + (param - before[name]) / 3
        torch.testing.assert_close(base.get_parameter(name), third, atol=1e-5, rtol=1e-4)
        changed += not torch.equal(param, before[name])
    assert changed == 14


def small_gpt2():
    """A random GPT-2 of transformers: an architecture that the scripts do not know."""
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=20, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0))


def plain_logprob(model, prompt, answer):
    """The sum of log π of the answer's tokens, from the logits of this row alone."""
    logprob = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(logprob[len(prompt) - 1 + i, token] for i, token in enumerate(answer))


def gradient_of(model):
    return torch.cat([param.grad.flatten() for param in model.parameters()])


def test_grpo_with_a_model_of_transformers():
    model = small_gpt2()
    rows = [([1, 2], [3, 4, 5, 0]), ([1, 2], [6, 0]), ([7, 8, 9], [0]), ([7, 8, 9], [3, 3, 3])]
    rewards = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    exec(example("transformers_grpo"), {"grpo": grpo, "model": model, "rows": rows,
                                        "rewards": rewards})
    ours = gradient_of(model)
    model.zero_grad()
    advantage = [0.5, -0.5, -1.5, 1.5]
    (-sum(a * plain_logprob(model, *row) for a, row in zip(advantage, rows)) / 10).backward()
    torch.testing.assert_close(ours, gradient_of(model), atol=1e-5, rtol=1e-4)
    assert ours.abs().max() > 0.01


def test_dpo_with_a_model_of_transformers():
    model, ref_logprob = small_gpt2(), torch.tensor([[-9.0, -7.0], [-3.0, -8.0]])
    pairs = [([1, 2], [3, 4, 5, 0], [6, 0]), ([7, 8, 9], [0], [3, 3, 3])]
    exec(example("transformers_dpo"), {"dpo": dpo, "model": model, "pairs": pairs,
                                       "ref_logprob": ref_logprob})
    ours = gradient_of(model)
    model.zero_grad()
    loss = 0
    for (prompt, chosen, rejected), (ref_w, ref_l) in zip(pairs, ref_logprob):
        difference = plain_logprob(model, prompt, chosen) - plain_logprob(model, prompt, rejected)
        loss = loss - torch.nn.functional.logsigmoid(0.1 * (difference - (ref_w - ref_l))) / 2
    loss.backward()
    torch.testing.assert_close(ours, gradient_of(model), atol=1e-5, rtol=1e-4)
    assert ours.abs().max() > 0.01
