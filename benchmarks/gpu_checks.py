"""Part 1 of gpu.py: do the scripts compute on a GPU what they compute on the CPU?

Every function gets a Run of gpu.py, which knows the device and writes the results.
"""

import importlib
import itertools
import random
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest import mock

import torch

SMALL_QWEN = {  # the structure of Qwen2.5
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 500,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 32_768, "tie_word_embeddings": True, "hidden_act": "silu",
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
BF16_LIMIT = 0.15  # bfloat16 has 8 significant bits; convolutions come near 0.06


def difference(result, expected):
    """Return how far dicts of tensors are apart: the largest relative error of a tensor.

    Errors of tensors that are nearly 0 are relative to a thousandth of the norm of all tensors.
    """
    if result.keys() != expected.keys():
        raise ValueError(f"different tensors: {result.keys() ^ expected.keys()}")
    floor = 1e-3 * sum(x.square().sum() for x in expected.values()).sqrt() + 1e-30
    errors = [(result[name] - x).norm() / max(x.norm(), floor) for name, x in expected.items()]
    return max(error if error == error else float("inf") for error in map(float, errors))


def gradients(loss, *models):
    """Return the loss and the gradients of the models as a dict of tensors on the CPU."""
    result = {"loss": loss.detach().double().cpu()}
    for number, model in enumerate(models):
        for name, param in model.named_parameters():
            result[f"{number} {name}"] = param.grad.detach().double().cpu()
    return result


def to_device(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}


def episodes_update(name, device):
    """One update of reinforce.py or reinforce_baseline.py on random episodes."""
    from gymnasium.spaces import Box, Discrete

    script = importlib.import_module(name)
    torch.manual_seed(0)
    obs_space = Box(-1, 1, (6,))
    policy = script.Policy(obs_space, Discrete(3)).to(device)
    batch = to_device({"obs": torch.randn(50, 8, 6), "action": torch.randint(3, (50, 8)),
                       "reward": torch.randn(50, 8), "mask": torch.rand(50, 8) < 0.9}, device)
    returns = script.discounted_returns(batch["reward"], 0.99)
    weight, loss, models = returns, 0.0, [policy]
    if name == "reinforce_baseline":
        models.append(script.Value(obs_space).to(device))
        baseline = models[1](batch["obs"])
        weight = returns - baseline.detach()
        loss = script.value_loss(baseline, returns, batch["mask"])
    logprob = policy(batch["obs"]).log_prob(batch["action"])
    loss = loss + script.policy_gradient_loss(logprob, weight, batch["mask"])
    loss.backward()
    return gradients(loss, *models)


def actor_critic_update(device):
    """One update of actor_critic.py on random steps."""
    from gymnasium.spaces import Box

    import actor_critic

    torch.manual_seed(0)
    model = actor_critic.ActorCritic(Box(-1, 1, (6,)), Box(-1, 1, (2,))).to(device)
    z = torch.randn(16, sum(param.numel() for param in model.parameters())).to(device)
    step = to_device({"obs": torch.randn(16, 6), "action": torch.randn(16, 2),
                      "next_obs": torch.randn(16, 6), "reward": torch.randn(16),
                      "terminated": torch.rand(16) < 0.2, "valid": torch.rand(16) < 0.8}, device)
    discount = torch.rand(16).to(device)
    delta, _, _ = actor_critic.learn(model, z, step, discount, 0.99, 0.9, 0.0)
    return gradients(delta, model)


def fast_agent(compile, bf16):
    """Return ppo.py's Agent with compiled networks and with bfloat16 inside of them."""
    import ppo

    class FastAgent(ppo.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            for net in filter(None, (self.cnn, self.actor, self.critic)):
                net.register_forward_hook(lambda net, inputs, output: output.float())
                if compile:
                    net.compile(dynamic=True)

        def features(self, obs):
            return with_bf16(super().features, obs)

        def policy(self, features):
            return with_bf16(super().policy, features)

        def forward(self, obs):
            return with_bf16(super().forward, obs)

    def with_bf16(function, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return function(x)

    return FastAgent


def ppo_update(obs_shape, device, compile=False, bf16=False):
    """One update of ppo.py on random rows, vectors or images."""
    from gymnasium.spaces import Discrete

    import ppo

    torch.manual_seed(0)
    args = ppo.Args(num_minibatches=1, update_epochs=1, max_grad_norm=1e9)
    agent = fast_agent(compile, bf16)(obs_shape, Discrete(6), args).to(device)
    obs = torch.randn(64, *obs_shape)
    if len(obs_shape) == 3:
        obs = torch.randint(256, (64, *obs_shape), dtype=torch.uint8)
    batch = to_device({"obs": obs, "action": torch.randint(6, (64, 1)), "target": torch.randn(64),
                       "logprob": 0.3 * torch.randn(64) - 1.8, "advantage": torch.randn(64)},
                      device)
    metrics = ppo.update(agent, torch.optim.SGD(agent.parameters(), 0.0), batch, args)
    return gradients(torch.tensor(metrics["policy_loss"] + metrics["value_loss"]), agent)


def small_model(script, args, device, seed, **flags):
    """Make a model with the structure of Qwen2.5, by the functions of grpo.py or dpo.py."""

    config = script.read_config(SMALL_QWEN, "small")
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in script.Decoder(config).state_dict().items()}
    weights = {name: 0.1 * torch.randn(shape, generator=generator) + ("norm" in name)
               for name, shape in shapes.items()}
    return script.make_model(config, weights, torch.device(device), args, **flags)


def random_tokens(rng, length):
    return [rng.randrange(1, SMALL_QWEN["vocab_size"]) for _ in range(length)]


def grpo_update(device, compile=False, bf16=False):
    """One update of grpo.py, with a reference policy, on random rows."""
    import grpo

    rng = random.Random(0)
    args = grpo.default_args(preset="grpo", device=device, compile=compile, bf16=bf16,
                             micro_batch_size=4, max_grad_norm=1e9)
    model = small_model(grpo, args, device, 0)
    reference = small_model(grpo, args, device, 1, is_reference=True)
    lengths = sorted((rng.randint(20, 60) for _ in range(12)), reverse=True)
    rows = [(random_tokens(rng, 8), random_tokens(rng, length - 8)) for length in lengths]
    inputs, targets, mask = grpo.pad_batch(rows, device)
    advantage = torch.tensor([rng.gauss(0, 1) for _ in rows], device=device)
    micro_batches = [(slice(start, start + 4), slice(0, lengths[start] - 1)) for start in (0, 4, 8)]
    batch = grpo.Batch(inputs, targets, mask, torch.zeros(mask.shape, device=device), advantage,
                       micro_batches)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    return gradients(grpo.update(model, reference, optimizer, batch, args)["loss"], model)


def dpo_update(device, compile=False, bf16=False):
    """One update of dpo.py on random pairs."""
    import dpo

    rng = random.Random(0)
    args = dpo.default_args(device=device, compile=compile, bf16=bf16, batch_size=6,
                            micro_batch_size=4, max_grad_norm=1e9, beta=0.1)
    model = small_model(dpo, args, device, 0)
    pairs = [dpo.Pair(*(random_tokens(rng, rng.randint(10, 30)) for _ in range(3)))
             for _ in range(args.batch_size)]
    pairs = [pairs[i] for i in dpo.by_length(pairs, range(len(pairs)))]
    ref_logprob = torch.tensor([[rng.gauss(-150, 5) for _ in range(2)] for _ in pairs])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    return gradients(dpo.update(model, optimizer, pairs, ref_logprob, args)["loss"], model)


def exact_float32():
    """Let matrix products and convolutions use all bits of float32."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


UPDATES = {
    "reinforce": partial(episodes_update, "reinforce"),
    "reinforce_baseline": partial(episodes_update, "reinforce_baseline"),
    "actor_critic": actor_critic_update,
    "ppo vectors": partial(ppo_update, (6,)),
    "ppo images": partial(ppo_update, (4, 84, 84)),
    "grpo": grpo_update,
    "dpo": dpo_update,
}
WITH_FLAGS = ("ppo vectors", "ppo images", "grpo", "dpo")  # can be compiled, and use bfloat16


def check_update(run, name, what, limit, **flags):
    """Compare loss and gradients of an update with those in float32 on the CPU."""
    exact_float32()
    result, expected = UPDATES[name](run.device, **flags), UPDATES[name]("cpu")
    run.check(what, difference(result, expected), limit)


def check_updates(run, kind, names, limit, **flags):
    for name in names:
        what = f"{name} update, {kind}"
        run.attempt(what, check_update, name, what, limit, **flags)


def frequency_error(tokens, probs):
    """Return how far the frequencies of draws are from probs, in standard deviations of χ²."""
    count = tokens.flatten().bincount(minlength=len(probs)).cpu().double()
    expected = probs.cpu().double() * count.sum()
    chi_square, freedom = ((count - expected) ** 2 / expected).sum(), len(probs) - 1
    return (chi_square - freedom) / (2 * freedom) ** 0.5


def check_sampling(run):
    """Compare samples with their distribution, and log π of the sampler with the CPU's."""
    import grpo
    import ppo

    exact_float32()
    torch.manual_seed(0)
    logprob = torch.linspace(0, 3, 50, device=run.device).log_softmax(0)
    many = logprob.expand(100_000, 50)
    draws = {"grpo": grpo.choose_token(many, 1.0),
             "ppo": ppo.MultiCategorical(many, [50]).sample()}
    for name, tokens in draws.items():
        run.check(f"{name} frequencies of 100,000 draws, in deviations of χ²",
                  frequency_error(tokens, logprob.exp()), 5.0)
    rng = random.Random(0)
    prompts = [random_tokens(rng, length) for length in (5, 9, 14)]
    args = grpo.default_args(device=run.device)
    completions = grpo.sample(small_model(grpo, args, run.device, 0), prompts, 4, 24, 1.0, [0])
    rows = [(completion.prompt, completion.tokens) for completion in completions]
    model = small_model(grpo, args, "cpu", 0)
    inputs, targets, mask = grpo.pad_batch(rows, "cpu")
    logprob = grpo.token_logprobs(model(inputs), model.output_weight(), targets, mask).detach()
    sampled = torch.zeros_like(logprob)
    for i, completion in enumerate(completions):
        start = len(completion.prompt) - 1
        sampled[i, start:start + len(completion.tokens)] = torch.tensor(completion.logprobs)
    run.check("grpo log π of the samples", (sampled - logprob).abs().max(), 1e-4)


BRIEF = {  # flags of runs that take few updates
    "reinforce": {"total_timesteps": 2_000},
    "reinforce_baseline": {"total_timesteps": 2_000},
    "actor_critic": {"total_timesteps": 4_096},
    "ppo": {"total_timesteps": 4_096},
    "grpo": {"max_steps": 2, "pretrain_steps": 20, "batch_size": 16, "eval_prompts": 16},
    "dpo": {"max_steps": 2, "pretrain_steps": 20, "batch_size": 64, "eval_pairs": 16,
            "train_pairs": 256},
}
LONGER = {"ppo": {"total_timesteps": 8_192}, "grpo": {"max_steps": 3}, "dpo": {"max_steps": 3}}


def smaller_config(tiny_config):
    return lambda vocab_size: tiny_config(vocab_size) | {"hidden_size": 16, "intermediate_size": 16}


def weights(model):
    return {name: x.detach().double().cpu() for name, x in model.state_dict().items()}


def count_ones(completion, example):
    """A reward that differs between the completions of a model that knows nothing."""
    return float(completion.count("1"))


def check_checkpoint(run, name, what, first, second):
    """Write a checkpoint on one device and continue on the other, for no step, then for some."""
    script = importlib.import_module(name)
    rewards = [count_ones] if name == "grpo" else []
    with tempfile.TemporaryDirectory(dir=run.work) as folder, ExitStack() as patches:
        args = script.Args(device=first, run_dir=f"{folder}/run", **BRIEF[name])
        if name != "ppo":  # these run longer from the start, and are stopped as if by Ctrl-C
            last_step, args = args.max_steps, replace(args, **LONGER[name])
            patches.enter_context(mock.patch.object(
                script.Logger, "stopped", lambda log: log.step >= last_step))
        model, _ = script.train(args, *rewards)
        args = replace(args, device=second, resume=args.run_dir)
        loaded, _ = script.train(args, *rewards)
        patches.close()
        longer, _ = script.train(replace(args, **LONGER[name]), *rewards)
    run.check(f"{what}: change of the weights", difference(weights(loaded), weights(model)), 0)
    change = difference(weights(longer), weights(model))
    run.write(f"{what}: continues", value=change, holds=0 < change < float("inf"))


def check_repetition(run, name, what):
    """Run a script twice with the same seed and compare the weights."""
    script, results = importlib.import_module(name), []
    rewards = [count_ones] if name == "grpo" else []
    for _ in range(2):
        with tempfile.TemporaryDirectory(dir=run.work) as folder:
            args = script.Args(device=run.device, run_dir=f"{folder}/run", **BRIEF[name])
            results.append(weights(script.train(args, *rewards)[0]))
    run.check(what, difference(*results), 1e-3)


def check_runs(run):
    """Check checkpoints that are moved between CPU and GPU, and the same run twice."""
    moves = {(run.device, "cpu"), ("cpu", run.device)}  # on the CPU these are one
    for name, (first, second) in itertools.product(LONGER, sorted(moves)):
        what = f"{name} checkpoint from {first} to {second}"
        run.attempt(what, check_checkpoint, name, what, first, second)
    for name in BRIEF:
        what = f"{name} run twice with one seed: change of the weights"
        run.attempt(what, check_repetition, name, what)


def right(run):
    run.attempt("sampling", check_sampling)
    check_updates(run, "float32", UPDATES, 1e-4)
    check_updates(run, "bf16", WITH_FLAGS, BF16_LIMIT, bf16=True)
    with ExitStack() as patches:
        for name in ("grpo", "dpo"):  # smaller models, as dpo.py's evaluations are slow on a CPU
            script = importlib.import_module(name)
            patches.enter_context(mock.patch.object(
                script, "tiny_config", smaller_config(script.tiny_config)))
        check_runs(run)
    run.reset()
    check_updates(run, "compiled", WITH_FLAGS, 1e-4, compile=True)  # last, as compiling is slow
    graphs = run.compiled_graphs()
    run.write("compiled graphs", value=graphs, holds=graphs >= len(WITH_FLAGS))
