"""The scripts run with --device cuda on any machine, on a virtual GPU.

VirtualGPU computes everything on the CPU. It knows which tensors would be on a GPU, and raises an
error where a GPU would: a function gets tensors of both devices, a generator of the other device,
or a tensor on the GPU is converted to numpy.

The six scripts had 107 places that put a tensor on a device when this was written. With one of them
removed or set to the CPU, in turn, these tests fail in 92 cases. In 11 of the others a single GPU
does not refuse: numbers and indices from the CPU, pretraining on the CPU, values that stay on the
GPU, an argument that is not used. 4 matter only to several processes. bfloat16 is not tried here.
"""

import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

COPIES = {"copy_", "data.__set__", "_has_compatible_shallow_copy_type"}  # from either device
INDEXING = {"__getitem__", "__setitem__"}  # indices and values of CUDA tensors may be the CPU's
# Elsewhere a CPU tensor without dimensions may meet CUDA tensors, as a number, except in these.
NO_NUMBERS = {"cat", "stack", "linear", "embedding", "gather", "index_add", "searchsorted"}


class Generator(torch.Generator):
    """Stands in for torch.Generator: draws on the CPU, but is on the device that was asked for."""

    device = None  # hides the attribute of torch.Generator, which cannot be set

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.device = torch.device(device)
        return self


class VirtualGPU(TorchFunctionMode):
    """Handles all calls of torch functions and methods inside a with statement.

    A tensor is on the virtual GPU if its memory is in on_gpu. All other memory is the CPU's.
    """

    def __init__(self):
        super().__init__()
        self.on_gpu = {}  # address -> weak reference, which keeps the address from being used again

    def is_cuda(self, tensor):
        return memory(tensor)._cdata in self.on_gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = name_of(func)
        if name == "device.__get__":
            return torch.device("cuda") if self.is_cuda(args[0]) else func(*args)
        if func is torch.device or name == "_parse_to":  # these only read "cuda"
            return func(*args, **kwargs)
        inputs = args[1:] if name == "tensor" else args  # torch.tensor takes data of any device
        leaves = tree_leaves((inputs, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # The device that was asked for; otherwise the result is where the inputs are.
        target = "cpu" if name == "cpu" else next(filter(None, map(device_type, leaves)), None)
        gpu = target == "cuda" if target else any(map(self.is_cuda, tensors))
        if not target:
            self.check_tensors(name, tensors)
        for generator in [leaf for leaf in leaves if isinstance(leaf, Generator)]:
            require((generator.device.type == "cuda") == gpu, f"{name}: generator of other device")
        args, kwargs = tree_map(cuda_to_cpu, (args, kwargs))
        result = func(*args, **kwargs)
        if target and isinstance(result, torch.Tensor) and self.is_cuda(result) != gpu:
            result = result.clone()  # .to() and .cpu() return their input, as it is on the CPU
        if gpu:
            self.mark(result, tensors)
        return result

    def mark(self, result, inputs):
        """Note that the results are on the GPU, except where their memory is that of an input."""
        known = {memory(tensor)._cdata for tensor in inputs}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and memory(tensor)._cdata not in known:
                storage = memory(tensor)
                self.on_gpu[storage._cdata] = StorageWeakRef(storage)

    def check_tensors(self, name, tensors):
        """Raise an error if a GPU would, because of the devices of the tensors."""
        gpu = [self.is_cuda(tensor) for tensor in tensors]
        if name in ("numpy", "__array__"):
            require(not any(gpu), f"{name}: CUDA tensor")
        elif name in INDEXING:
            require(gpu[0] or not any(gpu), f"{name}: CPU tensor with CUDA indices")
        elif any(gpu) and not all(gpu) and name not in COPIES:
            numbers = all(tensor.dim() == 0 or self.is_cuda(tensor) for tensor in tensors)
            in_place = name.endswith("_") and not name.endswith("__")
            require(numbers and name not in NO_NUMBERS and (gpu[0] or not in_place),
                    f"{name}: CPU and CUDA tensors")


def name_of(func):
    """Return the name of a torch function; that of an attribute is like "device.__get__"."""
    name = getattr(func, "__name__", "")
    return f"{func.__self__.__name__}.{name}" if name in ("__get__", "__set__") else name


def memory(tensor):
    """Return the storage of a tensor, also inside torch.func.vmap and grad."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


def device_type(leaf):
    """Return "cpu" or "cuda" if an argument is a device."""
    if isinstance(leaf, torch.device):
        return leaf.type
    return leaf if isinstance(leaf, str) and leaf in ("cpu", "cuda") else None


def cuda_to_cpu(leaf):
    return "cpu" if device_type(leaf) == "cuda" else leaf


def require(condition, message):
    if not condition:
        raise RuntimeError(message)


SIMPLE = {"total_timesteps": 256, "num_envs": 4, "eval_episodes": 1}
PPO = SIMPLE | {"num_steps": 32}
GRPO = {"max_steps": 2, "pretrain_steps": 1, "batch_size": 4, "eval_prompts": 4}
DPO = {"max_steps": 2, "pretrain_steps": 1, "batch_size": 4, "eval_pairs": 8, "train_pairs": 8}
CASES = [
    ("reinforce", SIMPLE),
    ("reinforce_baseline", SIMPLE),
    ("actor_critic", SIMPLE),
    ("ppo", PPO),
    ("ppo", PPO | {"env_id": "Pendulum-v1"}),
    ("grpo", GRPO | {"beta": 0.04}),
    ("grpo", GRPO | {"lora_rank": 2, "max_completion_length": 20}),  # drops finished rows
    ("dpo", DPO),
]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "Generator", Generator)
    with VirtualGPU() as mode:
        yield mode


def count_ones(completion, example):
    """Return a reward that differs between completions, so that there is something to learn."""
    return completion.count("1")


def smaller_config(tiny_config, vocab_size):
    """Return the config of a GPT that is faster than the tiny one."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return tiny_config(vocab_size) | small


REFUSED = {
    "CPU and CUDA": lambda cpu, cuda: cpu + cuda,
    "in-place": lambda cpu, cuda: cpu.sum().add_(cuda.sum()),
    "number of a function that takes none": lambda cpu, cuda: torch.stack([cpu[0], cuda[0]]),
    "CPU tensor indexed": lambda cpu, cuda: cpu[cuda > 0],
    "numpy": lambda cpu, cuda: cuda.numpy(),
    "generator": lambda cpu, cuda: cuda.exponential_(generator=torch.Generator()),
    "moved parameters": lambda cpu, cuda: torch.nn.Linear(3, 1).to("cuda")(cpu),
    "view": lambda cpu, cuda: cpu + cuda.view(3, 1).detach()[:, 0],
    "gradient": lambda cpu, cuda: cpu + torch.autograd.grad(cuda.sum(), cuda)[0],
}
ALLOWED = {
    "both moved": lambda cpu, cuda: cpu.to("cuda") + cuda,
    "moved back": lambda cpu, cuda: cpu + cuda.cpu(),
    "number": lambda cpu, cuda: cpu.sum() * cuda,
    "copy": lambda cpu, cuda: cpu.copy_(cuda) + cpu,
    "CUDA tensor indexed": lambda cpu, cuda: cuda[cpu > 0],
    "new tensor": lambda cpu, cuda: torch.zeros(3, device=cuda.device) + cuda,
    "like another": lambda cpu, cuda: torch.zeros_like(cuda) + cuda,
    "CPU alone": lambda cpu, cuda: cpu.numpy(),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, gpu):
    with pytest.raises(RuntimeError, match=r"CUDA|device"):
        REFUSED[case](torch.ones(3), torch.ones(3, device="cuda", requires_grad=case == "gradient"))


@pytest.mark.parametrize("case", ALLOWED)
def test_allowed(case, gpu):
    ALLOWED[case](torch.ones(3), torch.ones(3, device="cuda"))


@pytest.mark.parametrize("name, flags", CASES)
def test_a_run_and_its_continuation(name, flags, gpu, monkeypatch, tmp_path):
    script = importlib.import_module(name)
    if name in ("grpo", "dpo"):
        monkeypatch.setattr(script, "tiny_config", partial(smaller_config, script.tiny_config))
    args = script.Args(device="cuda", run_dir=str(tmp_path / "run"), **flags)
    rewards = [count_ones] if name == "grpo" else []
    with monkeypatch.context() as patch:
        if name in ("grpo", "dpo"):  # interrupted after the first step
            patch.setattr(script.Logger, "stopped", lambda log: log.step == 1)
        model, _ = script.train(args, *rewards)
    assert all(gpu.is_cuda(param) for param in model.parameters())
    if name in ("grpo", "dpo"):
        script.train(replace(args, resume=args.run_dir), *rewards)
    elif name == "ppo":
        script.train(replace(args, resume=args.run_dir, total_timesteps=512))
