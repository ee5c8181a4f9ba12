"""The data of grpo.py and dpo.py: files, layouts, chat templates, answers, plans."""

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

import dpo
import grpo

DATA = Path(__file__).parent / "data"
SPECIAL = ["<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
           "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
EOS = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>", None: "<|im_end|>"}


def make_folder(folder, template, eos=None):
    """Write the tokenizer of a model: a token for each byte, and special tokens."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(bytes_)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos or EOS[template]}
    if template == "llama3":
        tokenizer.post_processor = processors.TemplateProcessing(
            "<|begin_of_text|> $A",
            special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))])
        settings["bos_token"] = "<|begin_of_text|>"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        (folder / "chat_template.jinja").write_text((DATA / f"{template}.jinja").read_text())
    return folder


@pytest.fixture(params=[grpo, dpo], ids=["grpo", "dpo"])
def script(request):
    return request.param


@pytest.fixture
def chatml(tmp_path):
    return dpo.Tokenizer(make_folder(tmp_path / "chatml", "chatml"), {})


def question(text, answer=None):
    messages = [{"role": "user", "content": text}]
    return messages + ([{"role": "assistant", "content": answer}] if answer else [])


# Chat templates


def prompt_ids(script, tokenizer, prompt):
    """What a script makes of a prompt."""
    if script is grpo:
        return grpo.encode_prompt(prompt, tokenizer)
    rest = {"chosen": "a", "rejected": "b"}
    return list(dpo.read_pair({"prompt": prompt} | rest, tokenizer, 500)[1].prompt)


@pytest.mark.parametrize("template", ["chatml", "qwen", "llama3"])
def test_prompts_equal_transformers(script, template, tmp_path):
    folder = make_folder(tmp_path / "model", template)
    ours = script.Tokenizer(folder, {})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    system = [{"role": "system", "content": "Be brief."}]
    longer = question("a", "b") + question("c")
    for messages in (question("Hi there"), system + question("Hi"), longer):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt_ids(script, ours, messages) == list(expected)
    assert prompt_ids(script, ours, "Hi there") == theirs("Hi there")["input_ids"]


@pytest.mark.parametrize("template", ["chatml", "qwen", "llama3"])
def test_message_of_the_assistant_is_continued(template, tmp_path):
    folder = make_folder(tmp_path / "model", template)
    ours, theirs = grpo.Tokenizer(folder, {}), transformers.AutoTokenizer.from_pretrained(folder)
    for start in ("One, two, ", "One, two:\n", "    return", "<think>\n", "\n\nOne"):
        for asked in ("Count.", "Write <end of message> three times."):
            started = question(asked, start)
            expected = theirs.apply_chat_template(started, continue_final_message=True)
            assert grpo.encode_prompt(started, ours) == expected["input_ids"]


@pytest.mark.parametrize("start", ["end", "<", "|", "assistant", "\n"])
def test_any_beginning_of_a_message_is_continued(start, chatml):
    """Also one that occurs in what ends a turn."""
    text = chatml.decode(grpo.encode_prompt(question("Count.", "ok " + start), chatml), False)
    assert text == CHAT.format("Count.") + "ok " + start


def test_message_that_the_template_changes_cannot_be_continued(tmp_path):
    folder = make_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }} {% endfor %}")
    with pytest.raises(ValueError, match="cannot be continued"):
        grpo.encode_prompt(question("Count.", "One"), grpo.Tokenizer(folder, {}))


@pytest.mark.parametrize("template", ["chatml", "qwen", "llama3"])
def test_pairs_equal_transformers_up_to_the_stop_token(template, tmp_path):
    folder = make_folder(tmp_path / "model", template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    row = {"prompt": question("Which colour?"), "chosen": question("", "blue")[1:],
           "rejected": question("", "green")[1:]}
    _, pair = dpo.read_pair(row, dpo.Tokenizer(folder, {}), 200)
    for answer, text in ((pair.chosen, "blue"), (pair.rejected, "green")):
        ids = theirs.apply_chat_template(question("Which colour?", text))["input_ids"]
        assert theirs.convert_ids_to_tokens(answer[-1]) == EOS[template]
        ours = [*pair.prompt, *answer]
        assert ours == list(ids)[:len(ours)]
        assert theirs.decode(list(ids)[len(ours):]).strip() == ""
        assert theirs.decode(list(answer)).startswith(text)


def test_values_for_the_template(script, tmp_path):
    tokenizer = script.Tokenizer(make_folder(tmp_path, "qwen"), {"enable_thinking": False})
    text = tokenizer.render(question("Hi"), True)
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")


def test_values_for_the_template_replace_others(script, tmp_path):
    folder = make_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text("{{ tools }} {{ documents }}")
    assert script.Tokenizer(folder, {}).render(question("Hi"), True) == "None None"
    assert script.Tokenizer(folder, {"tools": [1]}).render(question("Hi"), True) == "[1] None"


def test_json_in_a_template_is_as_in_transformers(script, tmp_path):
    folder = make_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages if m.tool_calls %}{{ m.tool_calls | tojson }} "
        "{{ m.tool_calls | tojson(ensure_ascii=False, indent=2) }}{% endfor %}")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    call = {"z": "Zürich's <b>", "a": 1}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert "Zürich's <b>" in expected
    assert script.Tokenizer(folder, {}).render(messages, False) == expected


def test_saved_model_stops_at_the_tokens_that_training_stopped_at(script, tmp_path):
    """A base model whose chat template ends turns with another token than its files name."""
    folder = make_folder(tmp_path / "base", "qwen", eos="<|end_of_text|>")
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": 256, "temperature": 0.5}))
    tokenizer = script.Tokenizer(folder, {})
    prompt_ids(script, tokenizer, question("Hi"))
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    generation = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [256, 258], "temperature": 0.5}
    assert script.Tokenizer(tmp_path / "saved", {}).stop_ids == [256, 258]


def test_template_may_refuse_the_conversation_that_shows_the_stop_token(script, tmp_path):
    folder = make_folder(tmp_path, "chatml")
    path = folder / "chat_template.jinja"
    path.write_text("{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}"
                    "{% endif %}" + path.read_text())
    tokenizer = script.Tokenizer(folder, {})
    prompt = [{"role": "system", "content": "Be brief."}, *question("Hi")]
    assert prompt_ids(script, tokenizer, prompt)
    assert tokenizer.stop_ids == [tokenizer.tokenizer.token_to_id("<|im_end|>")]
    with pytest.raises(ValueError, match="no system"):
        tokenizer.render(question("Hi"), True)


def test_stop_token_is_the_one_that_ends_a_turn(script, tmp_path):
    """Also where the files name another: base models with a chat template."""
    folder = make_folder(tmp_path, "qwen", eos="<|end_of_text|>")
    tokenizer = script.Tokenizer(folder, {})
    end_of_text, _, im_end = range(256, 259)
    prompt_ids(script, tokenizer, question("Hi"))
    assert tokenizer.stop_ids == [end_of_text, im_end]
    if script is dpo:  # a text ends as the files say, an answer in a conversation as the template
        ends = [dpo.read_pair({"prompt": prompt, "chosen": "a", "rejected": "b"}, tokenizer, 99)
                [1].chosen[-1] for prompt in ("Hi", question("Hi"), "Hi")]
        assert ends == [end_of_text, im_end, end_of_text]


def test_white_space_before_the_token_that_ends_a_turn(script, tmp_path):
    folder = make_folder(tmp_path, "chatml", eos="<|end_of_text|>")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n <|im_end|>\n{% endfor %}")
    tokenizer = script.Tokenizer(folder, {})
    prompt_ids(script, tokenizer, question("Hi"))
    assert tokenizer.decode(tokenizer.stop_ids, False) == "<|end_of_text|><|im_end|>"


@pytest.mark.parametrize("template, error", [
    ("{% broken", "chat template"), ("{% for tool in tools %}{% endfor %}", "not iterable")])
def test_a_template_that_fails_does_not_matter_for_texts(template, error, script, tmp_path):
    (make_folder(tmp_path, "chatml") / "chat_template.jinja").write_text(template)
    tokenizer = script.Tokenizer(tmp_path, {})
    assert prompt_ids(script, tokenizer, "Hi") == tokenizer.encode("Hi")
    with pytest.raises((ValueError, TypeError), match=error):  # read_rows names the row
        prompt_ids(script, tokenizer, question("Hi"))


def test_a_prompt_without_tokens_is_bad(script, tmp_path):
    """Some tokenizers drop the characters that they do not know."""
    folder = make_folder(tmp_path / "base", "llama3")
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["post_processor"] = None
    del tokens["model"]["vocab"]["x"]
    tokens["model"]["unk_token"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    tokenizer = script.Tokenizer(folder, {})
    assert tokenizer.encode("x") == []
    row = {"prompt": "x", "chosen": "a", "rejected": "b", "answer": "1"}
    args = arguments(data=str(write(tmp_path / "rows.jsonl", [row])))
    with pytest.raises((ValueError, SystemExit), match="`prompt` has no tokens"):
        if script is dpo:
            dpo.read_pair(row, tokenizer, 99)
        else:
            grpo.load_examples(args, tokenizer, positions(500), grpo.default_reward)


@pytest.mark.parametrize("messages", [
    [], [1], [{"role": "human", "content": "Hi"}], [{"role": "user"}], [{"content": "Hi"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": [{"text": "Hi"}]}], 5])
def test_what_is_no_conversation_is_refused(script, chatml, messages):
    with pytest.raises(ValueError, match=r"`prompt`.* (must be|is empty)"):
        prompt_ids(script, chatml, messages)


def test_all_roles_of_chat_templates_are_accepted(script):
    roles = ("system", "developer", "user", "assistant", "tool")
    script.check_part("prompt", [{"role": role, "content": "Hi"} for role in roles])


def test_example_is_printed_with_special_tokens(chatml, capsys):
    for prompt, start in (("Hi", "Hi"), (question("Hi"), CHAT.format("Hi"))):
        row = {"prompt": prompt, "chosen": "you", "rejected": "he"}
        pair = dpo.read_pair(row, chatml, 99)[1]
        dpo.plan([pair], [pair], chatml, dpo.default_args("model"))
        out = capsys.readouterr().out
        assert f"{start}>>>you<|im_end|><<<" in out and ">>>he<|im_end|><<<" in out


# Layouts of preference data

CHAT = ("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n")
MESSAGES = [(CHAT.format("What colour is the sky?"), "It is blue.", "It is green."),
            (CHAT.format("What is two and two?"), "Four.", "Five.")]
SYSTEM = {"role": "system", "content": "You help."}
LAYOUTS = {
    "pairs_texts.jsonl": [("The sky is", " blue.", " green."),
                          ("Two and two is", " four.", " five.")],
    "pairs_messages.jsonl": MESSAGES,
    "pairs_conversations.jsonl": MESSAGES,
    "pairs_prompt_and_conversations.json": MESSAGES,
    "pairs_whole_texts.jsonl": [
        ("\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: What colour is the sky?\n\nAssistant:",
         " It is blue.", " It is green."),
        ("Two and two is", " four.", " five.")],
}


def read(path, tokenizer, max_length=500, skip_bad_rows=False):
    return [pair for _, pair in dpo.read_rows(
        path, lambda row: dpo.read_pair(row, tokenizer, max_length), skip_bad_rows)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_of_pairs(name, chatml):
    pairs = [tuple(chatml.decode(list(ids), False) for ids in pair)
             for pair in read(DATA / name, chatml)]
    assert pairs == [(prompt, chosen + "<|im_end|>", rejected + "<|im_end|>")
                     for prompt, chosen, rejected in LAYOUTS[name]]


def test_every_layout_has_a_file():
    assert set(LAYOUTS) == {path.name for path in DATA.glob("pairs*")}


@pytest.mark.parametrize("row, expected", [
    # A text beside messages is what the user says, or what the assistant answers.
    ({"prompt": "Hi", "chosen": question("", "a")[1:], "rejected": question("", "b")[1:]},
     (CHAT.format("Hi"), "a", "b")),
    ({"prompt": question("Hi"), "chosen": "a", "rejected": "b"}, (CHAT.format("Hi"), "a", "b")),
    # Whole conversations repeat the prompt; a text is ignored, as it may be formatted otherwise.
    ({"prompt": question("Hi"), "chosen": question("Hi", "a"), "rejected": question("Hi", "b")},
     (CHAT.format("Hi"), "a", "b")),
    ({"prompt": " hi", "chosen": question("Hi", "a"), "rejected": question("Hi", "b")},
     (CHAT.format("Hi"), "a", "b")),
    ({"prompt": "Hi", "chosen": [SYSTEM, *question("Hi", "a")],
      "rejected": [SYSTEM, *question("Hi", "b")]}, (CHAT.format("Hi"), "a", "b")),
    # White space at the beginning of an answer, such as the indent of code, is part of it.
    ({"prompt": question("Hi"), "chosen": "  a", "rejected": "b"},
     (CHAT.format("Hi"), "  a", "b")),
    # The common beginning of two answers is not part of the prompt.
    ({"chosen": "Say hi\nTom", "rejected": "Say hi\nTim"}, ("Say hi", "\nTom", "\nTim")),
    ({"chosen": "Say hi\n!", "rejected": "Say hi\n?"}, ("Say hi", "\n!", "\n?")),
    ({"chosen": "Q: name? A: Anna", "rejected": "Q: name? A: Anne"},
     ("Q: name? A:", " Anna", " Anne")),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: I am",
      "rejected": "\n\nHuman: Hi\n\nAssistant: I can"},
     ("\n\nHuman: Hi\n\nAssistant:", " I am", " I can")),
    # A turn that a text ends itself is not ended twice.
    ({"prompt": "Hi", "chosen": "a<|im_end|>", "rejected": "b"}, ("Hi", "a", "b")),
])
def test_rows_of_mixed_layout(row, expected, chatml):
    _, pair = dpo.read_pair(row, chatml, 500)
    texts = [chatml.decode(list(ids), False) for ids in pair]
    assert texts == [expected[0], *(answer + "<|im_end|>" for answer in expected[1:])]


def test_an_answer_of_several_turns_is_trained_to_its_last_stop_token(chatml):
    more = question("", "a")[1:] + question("Why?", "So.")
    row = {"prompt": question("Hi"), "chosen": more, "rejected": question("", "b")[1:]}
    _, pair = dpo.read_pair(row, chatml, 500)
    text = chatml.decode(list(pair.chosen), False)
    assert text.startswith("a<|im_end|>\n<|im_start|>user\nWhy?") and text.endswith("So.<|im_end|>")


@pytest.mark.parametrize("row, words", [
    ({"prompt": "Hi", "chosen": "a"}, "`rejected` must be a text, or chat messages"),
    ({"prompt": "Hi", "chosen": "a", "rejected": " "}, "`rejected` is empty"),
    *(({name: "Hi", "chosen": "a b", "rejected": "a c"}, "rename the column")
      for name in ("question", "instruction", "input", "query")),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "`prompt` is empty"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "equal"),
    ({"prompt": 5, "chosen": "a", "rejected": "b"}, "`prompt` must be a text"),
    ({"prompt": question("Hi"), "chosen": question("Hi"),
      "rejected": question("Hi", "b")}, "both must go on"),
    ({"chosen": question("Hi", "a"), "rejected": question("Hi", "a")}, "both must go on"),
    ({"chosen": question("Hi", "a"), "rejected": question("Ho", "a")}, "`prompt` is empty"),
    ({"chosen": question("Hi", "a"), "rejected": "b"}, "`prompt` is empty"),
    ({"chosen": question("Hi", "a") + question("x"),
      "rejected": question("Hi", "a") + question("y")}, "begin with a message"),
    ({"chosen": "left", "rejected": "right"}, "`prompt` is empty"),
    ({"prompt": "Hi", "chosen": [{"role": "gpt", "content": "a"}], "rejected": "b"}, "system"),
])
def test_bad_pairs_are_named(row, words, chatml):
    with pytest.raises(ValueError, match=words):
        dpo.read_pair(row, chatml, 500)


def test_conversations_are_split_by_the_prompt_that_they_share(chatml):
    rows = [{"chosen": question(text, "a"), "rejected": question(text, other)}
            for text, other in (("Hi", "b"), ("Hi", "c"), ("Ho", "b"))]
    one, two, three = (dpo.read_pair(row, chatml, 500)[0] for row in rows)
    assert one == two != three


def test_words_after_a_stop_token_are_trained_on(chatml):
    """A stop token within the words of an answer does not end it."""
    for text, end in (("write <|im_end|> here", "<|im_end|>"), ("blue<|im_end|>\n", ""),
                      ("a<|im_end|>\nb<|im_end|>", ""), ("blue", "<|im_end|>")):
        ids = dpo.encode_answer(text, chatml)
        assert chatml.decode(ids, False) == text.rstrip() + end


@pytest.mark.parametrize("row, words", [
    ({"prompt": "", "chosen": "blue", "rejected": "red"}, "`prompt` is empty"),
    ({"chosen": "blue", "rejected": "red"}, "`prompt` is empty"),
    ({"question": "Q", "chosen": "It is blue", "rejected": "It is red"}, "rename the column")])
def test_a_pair_without_a_prompt_is_bad(row, words, tmp_path):
    """Also if the tokenizer puts a token before each text."""
    tokenizer = dpo.Tokenizer(make_folder(tmp_path, "llama3"), {})
    with pytest.raises(ValueError, match=words):
        dpo.read_pair(row, tokenizer, 100)


def test_an_empty_prompt_is_bad(tmp_path):
    tokenizer = grpo.Tokenizer(make_folder(tmp_path, "llama3"), {})
    args = arguments(data=str(write(tmp_path / "rows.jsonl", [{"prompt": "", "answer": "1"}])))
    with pytest.raises(SystemExit, match="row 1: `prompt` is empty"):
        grpo.load_examples(args, tokenizer, positions(500), grpo.default_reward)


def test_template_that_changes_the_prompt_is_refused(tmp_path):
    folder = make_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text(
        "{{ messages | length }}{{ messages[-1].content }}<|im_end|>")
    row = {"prompt": question("Hi"), "chosen": question("", "a")[1:],
           "rejected": question("", "b")[1:]}
    with pytest.raises(ValueError, match="changes the prompt"):
        dpo.read_pair(row, dpo.Tokenizer(folder, {}), 500)


def test_template_that_changes_the_prompt_of_one_answer_is_refused(tmp_path):
    folder = make_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[-1].content == 'a' %}short: {% endif %}"
        "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}")
    for chosen, rejected in ("ab", "ba"):
        row = {"prompt": question("Hi"), "chosen": chosen, "rejected": rejected}
        with pytest.raises(ValueError, match="changes the prompt"):
            dpo.read_pair(row, dpo.Tokenizer(folder, {}), 500)


def test_long_pairs_are_cut_or_dropped(chatml):
    """The beginning stays, a cut answer has no stop token; equal cut answers are dropped."""
    row = {"prompt": "12345", "chosen": "abcdef", "rejected": "abX"}
    for length, chosen in ((12, "abcdef"), (11, "abcdef"), (8, "abc")):
        _, pair = dpo.read_pair(row, chatml, length)
        texts = [chatml.decode(list(ids)) for ids in pair]
        assert texts == ["12345", chosen, "abX"]
        assert (pair.chosen[-1] == 258) == (length == 12)
    for length in (7, 5, 2):
        assert dpo.read_pair(row, chatml, length) is None


# Files


def write(path, rows, as_array=False):
    text = json.dumps(rows, indent=1) if as_array else "\n".join(map(json.dumps, rows)) + "\n"
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_lines_and_arrays(script, name, tmp_path, capsys):
    rows = [{"n": n, "text": "é\u2028"} for n in range(5)]
    for as_array in (False, True):
        path = write(tmp_path / name, rows, as_array)
        assert script.read_rows(path, lambda row: row, False) == rows
        assert f"{name}: 5 rows used, 0 too long, 0 bad" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"\x50\x41\x52\x31\xff\xfe", b"[1, 2", b"\xff" * 20])
def test_other_files_are_refused_in_one_line(script, content, tmp_path):
    for name in ("a.parquet", "a.json.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match=r"expected JSON lines or a JSON") as stop:
            script.read_rows(tmp_path / name, lambda row: row, True)
        assert "\n" not in stop.value.code and name in stop.value.code


def test_a_text_that_is_not_valid_unicode_is_a_bad_row(script, chatml, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "good"}, {"text": "half a pair: \ud83d"}])
    rows = script.read_rows(path, lambda row: chatml.encode(row["text"]), True)
    assert rows == [chatml.encode("good")]
    with pytest.raises(SystemExit, match="row 2: "):
        script.read_rows(path, lambda row: chatml.encode(row["text"]), False)


def test_a_missing_file_is_named_in_one_line(script, tmp_path):
    with pytest.raises(SystemExit, match=r"--data .*rows\.jsonl: .* No such file"):
        script.read_rows(tmp_path / "rows.jsonl", lambda row: row, True)


def test_bad_rows_are_named_or_counted_by_reason(script, tmp_path, capsys):
    def parse(row):
        if row["n"] % 2:
            raise ValueError("odd")
        return row if row["n"] < 6 else None

    lines = [json.dumps({"n": n}) for n in range(10)] + ["", "prompt,answer", "3"]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit, match=r"rows\.jsonl, row 2: odd"):
        script.read_rows(path, parse, False)
    assert script.read_rows(path, parse, True) == [{"n": n} for n in (0, 2, 4)]
    out = capsys.readouterr().out
    assert "3 rows used, 2 too long, 7 bad" in out and "5 skipped: odd" in out
    assert "2 skipped: not a JSON object" in out
    path.write_text("prompt,answer\n")
    with pytest.raises(SystemExit, match="row 1: not a JSON object; expected JSON lines or"):
        script.read_rows(path, parse, False)
    path.write_text("[{\"n\": 0}, {\"n\": 1}]")
    with pytest.raises(SystemExit, match="row 2: odd"):
        script.read_rows(path, parse, False)
    path.write_text("")
    assert script.read_rows(path, parse, True) == []


# Prompts and answers of GRPO


def arguments(**changes):
    return grpo.default_args(**{"model": "m", "bf16": False, "device": "cpu"} | changes)


def positions(count):
    """What load_examples needs of a config."""
    return {"max_position_embeddings": count}


def test_prompts_reach_the_reward_with_all_columns(chatml, tmp_path, capsys):
    args = arguments(data=str(DATA / "questions.jsonl"), eval_prompts=1)
    draw, heldout = grpo.load_examples(args, chatml, positions(500), grpo.default_reward)
    rows = [json.loads(line) for line in (DATA / "questions.jsonl").read_text().splitlines()]
    drawn = [draw(random.Random(i)) for i in range(50)]
    assert len(heldout) == 1 and all(row in rows for row in drawn + heldout)
    assert len({json.dumps(row) for row in drawn}) == 3
    out = capsys.readouterr().out
    assert "3 prompts to learn from, 1 held out" in out and "as the model sees it:\n" in out


def test_only_the_default_reward_needs_answers(chatml, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"Write {n}"} for n in range(5)])
    args = arguments(data=str(path), eval_prompts=1)
    with pytest.raises(SystemExit, match="row 1: `answer` must be"):
        grpo.load_examples(args, chatml, positions(500), grpo.default_reward)
    assert len(grpo.load_examples(args, chatml, positions(500), len)[1]) == 1


@pytest.mark.parametrize("answer, words", [
    ("", "0 tokens"), ("####  ", "0 tokens"), ("x" * 21, "21 tokens; 1 to 20"), (None, "must be"),
    ([1], "must be"), ("so long an explanation that it does not fit\n#### 5", None), (5, None),
    (2.5, None)])
def test_answers_that_no_completion_can_give_are_bad(answer, words, chatml):
    if words is None:
        return grpo.check_answer(answer, chatml, 20)
    with pytest.raises(ValueError, match=words):
        grpo.check_answer(answer, chatml, 20)


def test_prompts_that_leave_no_room_are_dropped(chatml, tmp_path, capsys):
    rows = [{"prompt": "x" * n, "answer": "1"} for n in (40, 41, 80, 100, 101, 200)]
    path = write(tmp_path / "rows.jsonl", rows)
    for context, max_length, dropped in ((500, 120, 2), (100, 120, 3), (61, 500, 4)):
        args = arguments(data=str(path), max_completion_length=20, max_length=max_length)
        grpo.load_examples(args, chatml, positions(context), grpo.default_reward)
        expected = f"{6 - dropped} rows used, {dropped} too long, 0 bad"
        assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no room for a prompt"):
        grpo.load_examples(args, chatml, positions(20), grpo.default_reward)


REWARDS = [
    # completion, answer, reward
    ("18", "18", 1), ("It is 18.", "18", 1), ("so 18 apples", "#### 18", 1), ("19", "18", 0),
    ("18.0", "18", 1), ("$18.00", "18", 1), ("018", "18", 1), ("5/2", "2.5", 1), ("2.5", "5/2", 1),
    ("\u22125", "-5", 1), ("-5", "\u22125", 1), ("1,234", "1234", 1), ("1234", "1,234", 1),
    ("1,2,3", "123", 0), ("1,0000", "10000", 0), ("10-5", "5", 1), ("10-5", "-5", 0),
    ("x = -5", "-5", 1), ("(-5)", "-5", 1), (".5", "1/2", 1), (".5", "5", 0), ("1.5.", "1.5", 1),
    ("4 then 5", "4", 0), ("4 then 5", "5", 1), ("", "5", 0), ("no", "5", 0), ("1/0", "5", 0),
    ("5", "1/0", 0), ("1e3", "1000", 0), ("9" * 31, "9" * 31, 1), ("9" * 31 + " or 5", "5", 1),
    ("\u0665", "5", 0), ("50%", "50", 1), ("12345", "1234", 0), (r"\$18", "$18", 1),
    # the boxed or marked part counts
    (r"3, so \boxed{18} of 20", "18", 1), (r"\boxed{3} no, \boxed{18}", "18", 1),
    (r"\boxed{18} 7", "7", 0), ("#### 18", "18", 1), ("work 3\n#### 18 apples", "18", 1),
    ("####\n18\nThat took 100 steps.", "18", 1),
    (r"\boxed{\frac{1}{2}}", r"so \boxed{\frac{1}{2}}", 1), (r"\boxed{x+1}", "x+1", 1),
    (r"\boxed{18 \text{ apples}}", "18", 1), (r"\boxed{unclosed 18", "18", 1),
    (r"5 + \boxed{13 + 5 = 18}", "18", 0),
    ("Tom has 20-2=<<20-2=18>>18.\n#### 18", "20 - 2 = 18\n#### 18", 1),
    (r"\boxed{\frac{\sqrt{2}}{3}} is it", r"\frac{\sqrt{2}}{3}", 1),
    (r"\boxed{\frac{1}{2}}", ".5", 1), (r"\boxed{10.5}", r"2\frac{1}{2}", 0),
    (r"\boxed{2\frac{1}{2}}", r"2\frac{1}{2}", 1), (r"\boxed{1{,}000}", "1000", 1),
    (r"\boxed{\frac{1}{2}}", "2", 0), (r"\boxed{10^2}", "2", 0), (r"\boxed{1,2,3}", "3", 0),
    (r"\boxed{18} then \boxed{unclosed", "18", 1), (r"{\boxed{5}}", "5", 1), ("}5", "5", 1),
    (r"\boxed{}", "5", 0), ("####", "5", 0),
    # a formula is not the number in it
    (r"\boxed{\sqrt{2}}", "2", 0), (r"\boxed{2x}", "2", 0), (r"\boxed{x^2}", "2", 0),
    (r"\boxed{2\pi}", "2", 0), (r"\boxed{H_2O}", "2", 0), (r"\boxed{\pm 5}", "5", 0),
    (r"\boxed{x - 5}", "5", 0), (r"\boxed{5 - x}", "5", 0), (r"\boxed{5i}", "5", 0),
    (r"\boxed{\frac{5}{x}}", "5", 0), (r"\boxed{x \neq 5}", "5", 0), (r"\boxed{x > 5}", "5", 0),
    (r"\boxed{\sqrt{2}}", r"\sqrt{2}", 1), (r"\boxed{x = -5}", "-5", 1), ("#### 5 a day", "5", 1),
    (r"\boxed{x < 5}", "5", 0), (r"\boxed{50\%}", "50", 1), (r"\boxed{\$5}", "5", 1),
    (r"\boxed{\dfrac{1}{2}}", ".5", 1), (r"\boxed{\tfrac{1}{2}}", ".5", 1),
    ("1,000.50", "1000.5", 1), ("#### 3\nno\n#### 5", "5", 1), ("#### 3\nno\n#### 5", "3", 0),
    ("#### 18cm", "18", 1), ("#### 5 m", "5", 1), ("#### The answer is 18.", "18", 1),
    # as mathematicians and others write
    (r"\boxed{90^\circ}", "90", 1), (r"90^{\circ}", r"90^\circ", 1), (r"\boxed{\text{A}}", "A", 1),
    (r"\boxed{25\text{ cm}}", "25", 1), (r"\boxed{\frac{-3}{4}}", "-0.75", 1),
    (r"\boxed{10,\!000}", "10000", 1), ("\u20135", "-5", 1), ("3\u20135", "5", 1),
    ("_-5_", "-5", 1), ("\u662f-5\u3002", "-5", 1), ("\u662f-5\u3002", "5", 0),
    # texts
    ("Paris", "Paris", 1), (" Paris\n", "Paris", 1), ("Paris!", "Paris", 0), ("paris", "Paris", 0),
    ("#### Paris", "Paris", 1), ("1,2,3", "1,2,3", 1),
]


@pytest.mark.parametrize("completion, answer, reward", REWARDS)
def test_default_reward(completion, answer, reward):
    assert grpo.default_reward(completion, {"answer": answer}) == reward


@pytest.mark.parametrize("text", ["\\boxed{" * 2000, "{" * 10_000, "1," * 5000, "-" * 10_000,
                                  "9" * 10_000, "1/" * 5000, "\\boxed{" + "{}" * 5000])
def test_long_completions_are_judged_quickly(text):
    """In a process, so that one that never ends is noticed."""
    code = f"import grpo; grpo.default_reward({text!r}, {{'answer': '5'}})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=DATA.parent.parent)


def test_evaluations_take_a_tenth_of_a_run():
    """Counted in completions, a trained one as 2.5."""
    for batch, num_heldout in ((32, 256), (8, 40), (4, 6), (16, 1), (1, 256)):
        args = arguments(batch_size=batch, num_generations=8, eval_every=0)
        every = grpo.plan_evaluations(num_heldout, args)
        share = num_heldout / (every * 2.5 * batch * 8)
        assert share <= 0.1 and (every == 1 or share > 0.05)
    assert grpo.plan_evaluations(256, arguments(eval_every=3)) == 3


def test_at_most_a_tenth_of_the_prompts_is_held_out(chatml, tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(f'{{"prompt": "{n}", "answer": 1}}\n' for n in range(40)))
    for wanted, expected in ((256, 4), (2, 2)):
        args = arguments(data=str(path), eval_prompts=wanted)
        draw, heldout = grpo.load_examples(args, chatml, positions(300), lambda text, row: 0)
        assert len(heldout) == expected
        assert not {row["prompt"] for row in heldout} & {
            draw(random.Random(n))["prompt"] for n in range(200)}
    _, heldout = grpo.load_examples(grpo.Args(), grpo.Characters(), positions(64), grpo.exact_match)
    assert len(heldout) == 256


# Batches and step sizes of DPO


def test_every_pair_is_used_once_in_an_epoch():
    epochs = [[dpo.batch_indices(5 * epoch + step, 23, 4, seed=3) for step in range(5)]
              for epoch in range(3)]
    for epoch in epochs:
        flat = [i for batch in epoch for i in batch]
        assert len(flat) == 20 and len(set(flat)) == 20 and set(flat) <= set(range(23))
    assert epochs[0] != epochs[1] != epochs[2]
    assert dpo.batch_indices(0, 23, 4, seed=3) != dpo.batch_indices(0, 23, 4, seed=4)
    assert dpo.batch_indices(5, 23, 4, seed=3) != dpo.batch_indices(0, 23, 4, seed=4)


def test_learning_rate_rises_and_falls():
    rates = [dpo.learning_rate_factor(step, 10, 0.2) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    rates = [dpo.learning_rate_factor(step, 4, 0.0) for step in range(4)]
    assert rates == [1, 0.75, 0.5, 0.25]


def test_plan_of_a_run(capsys):
    pair = dpo.Pair([1], [2, 0], [3, 0])
    tokenizer = SimpleNamespace(stop_ids=[0], decode=lambda *_: "")
    for flags, pairs, heldout, steps, every in (
            ({"num_epochs": 2, "batch_size": 10}, 105, 11, 20, 8),
            ({"num_epochs": 2, "batch_size": 10, "max_steps": 7}, 105, 11, 7, 8),
            ({"num_epochs": 1, "batch_size": 10, "max_steps": 25}, 105, 11, 25, 8),
            ({"num_epochs": 1, "batch_size": 16}, 60_000, 256, 3750, 107)):
        args = dpo.default_args(eval_every=0, **flags)
        cut = [dpo.Pair([1], [2], [3])]
        result = dpo.plan([pair] * (pairs - 1) + cut, [pair] * heldout, tokenizer, args)
        assert result == (steps, every)
        assert (f"{pairs} pairs to learn from, {heldout} held out; 2 answers cut; {steps} batches"
                in capsys.readouterr().out)
        evaluations = 1 + steps // every
        assert evaluations * heldout <= 0.06 * 3 * steps * args.batch_size + 2 * heldout


def test_only_pairs_that_are_used_are_kept(chatml, tmp_path):
    rows = [{"prompt": f"{n:02}", "chosen": "a", "rejected": "b"} for n in range(50)]
    path = write(tmp_path / "pairs.jsonl", rows)
    model = SimpleNamespace(config={"max_position_embeddings": 64})
    args = dpo.default_args(data=str(path), batch_size=4, max_steps=3)
    pairs, heldout = dpo.load_pairs(args, chatml, model, None)
    assert (len(pairs), len(heldout)) == (12, 5)


def test_pairs_are_small_in_memory(chatml):
    row = {"prompt": "Hi", "chosen": "a" * 400, "rejected": "b" * 400}
    _, pair = dpo.read_pair(row, chatml, 1000)
    assert sum(map(sys.getsizeof, pair)) < 5 * 804 + 300
    inputs, targets, _ = dpo.pad_batch([(pair.prompt, pair.chosen)], "cpu")
    assert inputs.dtype == targets.dtype == torch.long


# Models


@pytest.mark.parametrize("model", ["./missing", "/missing/model", "a/b/c", "~/missing"])
def test_missing_folder_is_said_without_asking_the_hub(script, model, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: 1 / 0)
    with pytest.raises(SystemExit, match=f"--model {model}: no such folder") as stop:
        script.load_model(SimpleNamespace(model=model))
    assert "\n" not in str(stop.value)


def test_unsupported_architecture_is_refused_before_the_download(script, tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "hidden_size": 8}))
    calls = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda *args: calls.append(args) or tmp_path / "config.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(SystemExit, match="model_type mixtral is not supported"):
        script.load_model(SimpleNamespace(model="owner/name"))
    assert calls == [("owner/name", "config.json")]


def test_weights_in_another_format_are_named(script, tmp_path):
    folder = make_folder(tmp_path, "chatml")
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"no \*.safetensors"):
        script.load_model(SimpleNamespace(model=str(folder)))


# Further cases


def test_ordinary_text_after_an_answer_is_no_stop_token(script, tmp_path):
    folder = make_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n### End\n{% endfor %}")
    tokenizer = script.Tokenizer(folder, {})
    prompt_ids(script, tokenizer, question("Hi"))
    assert tokenizer.decode(tokenizer.stop_ids, False) == "<|im_end|>"


def test_stop_token_of_a_template_that_says_answer_itself(script, tmp_path):
    folder = make_folder(tmp_path, "qwen", eos="<|end_of_text|>")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("You are a helpful", "You give helpful answers,"))
    assert "helpful answers" in path.read_text()
    tokenizer = script.Tokenizer(folder, {})
    prompt_ids(script, tokenizer, question("Hi"))
    assert tokenizer.decode(tokenizer.stop_ids, False) == "<|end_of_text|><|im_end|>"


def test_newlines_of_a_template_are_as_in_transformers(script, tmp_path):
    folder = make_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}\n    {% if m.content %}\n<{{ m.role }}>\n{{ m.content }}\n"
        "    {% endif %}\n{% endfor %}\n")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(question("Hi"), tokenize=False)
    assert script.Tokenizer(folder, {}).render(question("Hi"), False) == expected


def test_every_process_holds_out_the_same_prompts(script):
    """Python's hash of a text would be another one in each process."""
    code = f"import {script.__name__} as script; print(script.split_hash('1+1='))"
    done = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                           cwd=DATA.parent.parent, timeout=60) for _ in range(2)]
    assert {float(each.stdout) for each in done} == {script.split_hash("1+1=")}


def test_special_tokens_may_be_objects(script, tmp_path):
    folder = make_folder(tmp_path, "llama3")
    texts, path = script.Tokenizer(folder, {}), folder / "tokenizer_config.json"
    path.write_text(json.dumps({
        name: {"content": value, "lstrip": False} if name.endswith("_token") else value
        for name, value in json.loads(path.read_text()).items()}))
    objects = script.Tokenizer(folder, {})
    assert objects.render(question("Hi"), True) == texts.render(question("Hi"), True)
    assert objects.stop_ids == texts.stop_ids


def test_a_special_token_that_is_null_is_none(script, tmp_path):
    folder = make_folder(tmp_path, "chatml")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": None}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert script.Tokenizer(folder, {}).render(question("Hi"), True) == "Hi"


def test_a_text_ends_with_the_token_that_the_tokenizer_names(tmp_path):
    """Also if generation_config.json begins with another, as that of Llama 3 does."""
    folder = make_folder(tmp_path, "llama3")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 262]}))
    tokenizer = dpo.Tokenizer(folder, {})
    assert tokenizer.decode(dpo.encode_answer("a", tokenizer), False) == "a<|eot_id|>"


def test_saved_model_has_the_chat_template(script, tmp_path):
    tokenizer = script.Tokenizer(make_folder(tmp_path / "base", "chatml"), {})
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    text = script.Tokenizer(tmp_path / "saved", {}).render(question("Hi"), True)
    assert text == CHAT.format("Hi")


def test_templates_know_the_date(script, tmp_path):
    folder = make_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%Y') if strftime_now is defined else 'unknown' }}")
    assert script.Tokenizer(folder, {}).render(question("Hi"), True).isdigit()


def test_file_of_the_template_comes_before_the_old_place(script, tmp_path):
    folder = make_folder(tmp_path, "chatml")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "old"}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(question("Hi"), tokenize=False)
    assert script.Tokenizer(folder, {}).render(question("Hi"), False) == expected != "old"


def test_download_has_weights_tokenizer_and_chat_template(script, tmp_path, monkeypatch):
    import huggingface_hub

    asked, path = [], tmp_path / "config.json"
    path.write_text(json.dumps(
        {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, allow_patterns: (
        asked.extend(allow_patterns) or tmp_path))
    assert script.download("owner/name") == tmp_path
    assert {"*.json", "*.jinja", "*.safetensors"} <= set(asked)


def test_a_template_is_compiled_once(script, tmp_path, monkeypatch):
    """Not for each row: that takes hundreds of times as long as to use it."""
    compiled, jinja = [], script.jinja2.sandbox.ImmutableSandboxedEnvironment
    from_string = jinja.from_string
    monkeypatch.setattr(jinja, "from_string", lambda self, source: (
        compiled.append(source), from_string(self, source))[1])
    folder = make_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text(
        f"{{# {script.__name__} #}}" + (folder / "chat_template.jinja").read_text())
    tokenizer = script.Tokenizer(folder, {})
    for text in ("Hi", "Ho", "Hu"):
        assert text in tokenizer.render(question(text), True)
    assert len(compiled) == 1


def test_an_empty_message_before_the_last_one_is_allowed(script, chatml):
    """Such as the empty system prompt of many data sets."""
    empty = {"role": "system", "content": ""}
    assert prompt_ids(script, chatml, [empty, *question("Hi")])
    for content in ("", " \n"):
        with pytest.raises(ValueError, match="`prompt` is empty"):
            prompt_ids(script, chatml, [SYSTEM, {"role": "user", "content": content}])


def test_an_incomplete_gz_file_is_refused_in_one_line(script, tmp_path):
    path = write(tmp_path / "a.jsonl.gz", [{"n": n} for n in range(1000)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SystemExit, match=r"a\.jsonl\.gz: expected JSON lines or a JSON array"):
        script.read_rows(path, lambda row: row, True)


def test_white_space_before_an_array(script, tmp_path):
    (tmp_path / "a.json").write_text("\n  [\n{\"n\": 1},\n{\"n\": 2}\n]\n")
    assert script.read_rows(tmp_path / "a.json", dict, False) == [{"n": 1}, {"n": 2}]


def test_after_a_checkpoint_the_time_begins_anew(script, tmp_path, monkeypatch):
    """A batch takes 4 of the 10 seconds between checkpoints, on a clock that the test moves."""
    saved, clock = [], [0.0]
    monkeypatch.setattr(script.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "save", lambda state, path: (
        saved.append(state["progress"]["step"]), path.write_bytes(b"")))
    args = script.default_args(checkpoint_seconds=10.0, run_dir=str(tmp_path), device="cpu")
    model = torch.nn.Linear(1, 1)
    pretrained = [None] if script is grpo else []
    log = script.Logger(args, model, torch.optim.AdamW(model.parameters()), *pretrained)
    for step in range(1, 10):
        clock[0] += 4
        log.step = step
        log.write()
    assert saved == [3, 6, 9]


def test_one_token_after_an_answer_is_a_stop_token(script, tmp_path):
    """Not what may follow it, such as the beginning of the next turn."""
    folder = make_folder(tmp_path, "chatml")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<|im_end|><|im_start|>{% endfor %}")
    tokenizer = script.Tokenizer(folder, {})
    assert tokenizer.decode(tokenizer.stop_ids, False) == "<|im_end|>"


def test_flag_replaces_a_special_token_of_the_files(script, tmp_path):
    folder = make_folder(tmp_path, "llama3")
    text = script.Tokenizer(folder, {"bos_token": ""}).render(question("Hi"), True)
    assert "Hi" in text and "<|begin_of_text|>" not in text


def test_only_the_first_process_prints_the_rows_of_a_file(script, tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [{"n": 1}])
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setattr(script, "get_rank", lambda: rank)  # noqa: B023
        script.read_rows(path, dict, False)
        assert capsys.readouterr().out.count("rows used") == lines
