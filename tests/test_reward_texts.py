"""A reward model scores texts that are formed as in its training, or is refused: formats, records, padding, limits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import processors
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, XLNetConfig

from rlhf_accel.commands.checks.reward_checks import check_classifier
from rlhf_accel.config.loading import parse
from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.config.schema import Config, RewardConfig
from rlhf_accel.data import reward_texts
from rlhf_accel.models import classifier as classifiers
from rlhf_accel.reward import Classifier, cautions, classifier, classifier_checks, load_reward
from rlhf_accel.system import arithmetic
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.training import feedback_trainer, reward_trainer
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests.conftest import TEXTS, make_tokenizer

pytestmark = pytest.mark.usefixtures("exact_fp32")
CPU = torch.device("cpu")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def turns(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def training(folder: Path, base: Path, rows: list[dict], **data: object) -> RewardTrainingConfig:
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree = {
        "run": {"output_dir": str(folder / "reward"), "precision": "fp32", "eval_every": 0},
        "model": {"name_or_path": str(base)},
        "data": {"source": str(source), "objective": "pairs", "max_tokens": 48, **data},
        "optim": {"lr": 3e-3, "epochs": 1, "batch_size": 8},
    }
    return parse(RewardTrainingConfig, tree)


def pairs(chat: bool = True, count: int = 40) -> list[dict]:
    made = turns if chat else (lambda prompt, answer: f"{prompt} {answer}")
    return [
        {
            "chosen": made(f"film {i}?", TEXTS[i % 4][: 12 + i % 9]),
            "rejected": made(f"film {i}?", TEXTS[4 + i % 4][: 12 + i % 7]),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 whose tokenizer has turns, puts BOS before every text and pads on the left."""
    folder = tmp_path_factory.mktemp("chat_base")
    tokenizer = make_tokenizer(300, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, num_labels=1, initializer_range=0.3
    )
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    return folder


@pytest.fixture(scope="module")
def chat_reward(chat_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that train-reward made of conversations."""
    place = tmp_path_factory.mktemp("chat_reward")
    torch.set_float32_matmul_precision("highest")
    reward_trainer.train_reward(training(place, chat_base, pairs()))
    return place / "reward"


def judge(folder: Path, **settings: object) -> Classifier:
    settings = {"model": str(folder), "dtype": "fp32", **settings}
    return Classifier(RewardConfig(**settings), str(folder), CPU)  # type: ignore[arg-type]


def test_scoring_forms_the_ids_that_training_made(chat_base, chat_reward) -> None:
    """Also for a prompt and a response as PPO has them: plain text, without special tokens."""
    trained: list[list[int]] = []
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    for row in pairs(count=3):
        laid_out = tokenizer.apply_chat_template(row["chosen"], tokenize=False)
        trained.append(tokenizer(laid_out, add_special_tokens=False)["input_ids"][:48])
    model = judge(chat_reward)
    assert model.format == "chat"
    prompts, answers = [f"film {i}?" for i in range(3)], [TEXTS[i][: 12 + i] for i in range(3)]
    rows, _ = reward_texts.encode(model.tokenizer, model.formed(prompts, answers, {}), model.max_tokens)
    assert [row["input_ids"] for row in rows] == trained
    plain = judge(chat_reward, format="plain")
    assert abs(plain(prompts, answers)[0] - model(prompts, answers)[0]) > 0.05, "the layout matters to this model"


def test_the_record_holds_training_texts_and_the_scores_as_written(chat_reward) -> None:
    record = reward_texts.read(str(chat_reward), "it")
    assert record is not None and (record.format, record.max_tokens, record.around) == ("chat", 48, ("<s>", ""))
    assert len(record.probes) == 4 and len({len(probe.ids) for probe in record.probes}) > 1
    model = transformers.AutoModelForSequenceClassification.from_pretrained(chat_reward)
    for probe in record.probes:
        with torch.no_grad():
            torch.testing.assert_close(
                model(torch.tensor([probe.ids])).logits[0], torch.tensor(probe.scores), atol=1e-5, rtol=1e-5
            )


def changed(folder: Path, place: Path, change) -> Path:
    shutil.copytree(folder, place)
    change(place)
    return place


def another_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<|turn|>", "### "))


def other_weights(folder: Path, factor: float = 1.02) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.mul_(factor)
    model.save_pretrained(folder)


def another_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(folder)


def other_merges(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["model"]["merges"] = tree["model"]["merges"][:-8]
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def damaged(folder: Path) -> None:
    (folder / reward_texts.FILE).write_text('{"format": "chat", "texts": ' + "9" * 5000)


def deep(folder: Path) -> None:
    (folder / reward_texts.FILE).write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (another_template, r"its chat template turns .* into '### .* it gave '<\|turn\|>.*train again"),
        (other_weights, r"the training text .* scores \[.*and training left .*its weights have changed"),
        (
            another_tokenizer,
            r"puts \('', '</s>'\) around every text, and in training it put \('<s>', ''\)",
        ),
        (other_merges, r"the training text .* becomes \d+ tokens where training made \d+, of which number \d+ is the"),
        (damaged, r"its reward_texts\.json.* is damaged \("),
        (deep, r"its reward_texts\.json.* is damaged \("),
    ],
)
def test_what_differs_from_the_training_is_refused_in_one_line(chat_reward, tmp_path, change, match) -> None:
    folder = changed(chat_reward, tmp_path / "reward", change)
    with pytest.raises(ConfigError, match=match) as caught:
        judge(folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("reward.model=")
    assert caught.value.key == "reward.model"


def test_texts_are_cut_as_in_training(chat_reward, tmp_path) -> None:
    shutil.copytree(chat_reward, tmp_path / "reward")
    record = reward_texts.read(str(chat_reward), "it")
    reward_texts.write(tmp_path / "reward", replace(record, max_tokens=12, truncation_side="left", probes=[]))
    model = judge(tmp_path / "reward")
    (row,), (cut,) = reward_texts.encode(model.tokenizer, TEXTS[:1], model.max_tokens)
    whole = AutoTokenizer.from_pretrained(chat_reward)(TEXTS[0])["input_ids"]
    assert cut and row["input_ids"] == [whole[0], *whole[-11:]], "BOS and the end"


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"text": "response"}, "reward.text"), ({"format": "plain", "chat_field": "x"}, "reward.chat_field")],
)
def test_settings_that_do_not_fit_the_training_are_refused(chat_reward, settings, key) -> None:
    with pytest.raises(ConfigError) as caught:
        judge(chat_reward, **settings)
    assert caught.value.key == key


def test_a_column_holds_the_prompt_where_the_policys_own_is_laid_out(chat_reward) -> None:
    model = judge(chat_reward, chat_field="messages")
    plain, chat = judge(chat_reward)(["film 1?"], TEXTS[:1]), ["film 1?", turns("film 1?", "an old answer")]
    for given in chat:
        assert model(["user\nfilm 1?\n"], TEXTS[:1], messages=[given]) == plain
    with pytest.raises(KeyError, match=r"messages \(reward\.chat_field\) is not a column"):
        model(["user\nfilm 1?\n"], TEXTS[:1])


def test_prompts_that_are_laid_out_themselves_are_refused_by_the_run(chat_base, chat_reward, tmp_path) -> None:
    """Their special tokens do not reach the reward: it would read a turn within a turn."""
    config = transformers.GPT2Config.from_pretrained(chat_base)
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    rows = [
        {"ask": text, "text": tokenizer.apply_chat_template([{"role": "user", "content": text[:9]}], tokenize=False)}
        for text in TEXTS
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "run": {"output_dir": str(tmp_path / "run"), "total_steps": 1, "eval_samples": 0, "trackers": []},
        "model": {"name_or_path": str(tmp_path / "policy"), "dtype": "fp32"},
        "data": {"source": str(tmp_path / "prompts.jsonl")},
        "rollout": {"batch_size": 4, "max_prompt_tokens": 32, "max_new_tokens": 4},
        "reward": {"model": str(chat_reward), "dtype": "fp32"},
    }
    with pytest.raises(ConfigError, match=r"reads conversations, and prompts .* such as <\|turn\|>"):
        PPOTrainer(parse(Config, tree))
    tree["reward"]["chat_field"] = "ask"
    PPOTrainer(parse(Config, tree))


def test_a_reward_model_of_conversations_scores_in_ppo_what_it_scored_in_its_evaluation(
    chat_base, chat_reward, tmp_path
) -> None:
    """The conversations of the data become those of its training, with the response; by an independent pass, too."""
    transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(chat_base)).save_pretrained(
        tmp_path / "policy"
    )
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    tokenizer.save_pretrained(tmp_path / "policy")
    cells = [turns(f"film {i}?", "an old answer") for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": cell}) + "\n" for cell in cells))
    tree = {
        "run": {"output_dir": str(tmp_path / "run"), "total_steps": 1, "eval_samples": 0, "trackers": []},
        "model": {"name_or_path": str(tmp_path / "policy"), "dtype": "fp32"},
        "data": {"source": str(tmp_path / "prompts.jsonl"), "chat": True},
        "rollout": {"batch_size": 4, "max_prompt_tokens": 32, "max_new_tokens": 4},
        "reward": {"model": str(chat_reward), "dtype": "fp32"},
    }
    trainer = PPOTrainer(parse(Config, tree))
    trainer.step(trainer.setup.prompts.batch(1, 4))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(chat_reward)
    asked = trainer.columns["messages"]
    for row, text, score in zip(asked, trainer.rollout.texts, trainer.rollout.scores.tolist(), strict=True):
        assert [turn["role"] for turn in row] == ["user"]
        ids = tokenizer.apply_chat_template(turns(row[0]["content"], text), tokenize=True, return_dict=False)
        with torch.no_grad():
            assert score == pytest.approx(float(model(torch.tensor([ids])).logits[0, 0]), abs=1e-5)
    record = reward_texts.read(str(chat_reward), "it")
    said = {tokenizer.apply_chat_template(pair[key], tokenize=False): pair[key] for pair in pairs() for key in pair}
    assert record is not None and record.ends == ("<s>", "")
    for probe in record.probes:
        prompt, answer = said["<s>" + probe.text]
        found = trainer.reward(["unused"], [answer["content"]], {"messages": [[prompt]]})
        assert found.tolist() == pytest.approx(probe.scores, abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (pairs(chat=False), "plain"),
        (pairs()[:20] + pairs(chat=False)[20:], "mixed"),
        ([{key: f"<|turn|>{text}" for key, text in row.items()} for row in pairs(chat=False)], "marked"),
    ],
)
def test_what_was_trained_on_is_recorded_and_what_is_unclear_is_asked(rows, kind, chat_base, tmp_path) -> None:
    reward_trainer.train_reward(training(tmp_path, chat_base, rows))
    record = reward_texts.read(str(tmp_path / "reward"), "it")
    assert record is not None and record.format == kind
    if kind == "plain":
        assert judge(tmp_path / "reward").format == "plain"
        return
    with pytest.raises(ConfigError, match=r"set reward\.format=chat") as caught:
        judge(tmp_path / "reward")
    assert caught.value.key == "reward.format"
    assert judge(tmp_path / "reward", format="chat").format == "chat"


def test_texts_that_are_cut_in_training_are_counted_and_said(chat_base, tmp_path, capsys) -> None:
    rows = pairs(chat=False)
    rows[0]["chosen"] = "long " * 60
    metrics = reward_trainer.train_reward(training(tmp_path, chat_base, rows, eval_split=held(tmp_path)))
    lengths = [
        len(AutoTokenizer.from_pretrained(chat_base)(text)["input_ids"]) for row in rows for text in row.values()
    ]
    assert metrics["reward/cut_texts"] == sum(length > 48 for length in lengths) >= 1
    assert f"{metrics['reward/cut_texts']} of {len(set(lengths)) and len(lengths)} training texts" in (
        capsys.readouterr().out
    )


def held(folder: Path) -> str:
    path = folder / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs(chat=False, count=50)[40:]), encoding="utf-8")
    return str(path)


def test_a_written_model_that_is_not_the_trained_one_is_not_written(chat_base, tmp_path, monkeypatch) -> None:
    """A head that is folded wrongly, as by a fault in the writing."""
    finish = classifiers.finish
    monkeypatch.setattr(classifiers, "finish", lambda *given: finish(*given[:-1], 2 * given[-1]))
    with pytest.raises(RunFailed, match="the written model is not the trained one: the training text"):
        reward_trainer.train_reward(training(tmp_path, chat_base, pairs()))
    assert not (tmp_path / "reward").exists()
    assert (tmp_path / "reward.refused" / "model.safetensors").exists(), "the training is not lost"


def test_a_tokenizer_that_reads_other_ids_than_in_training_is_not_written(chat_base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(classifiers, "finish", lambda folder, *_: other_merges(folder))
    with pytest.raises(RunFailed, match=r"the written model is not the trained one: .* tokens where training made"):
        reward_trainer.train_reward(training(tmp_path, chat_base, pairs()))


@pytest.fixture
def medium_products(monkeypatch) -> Iterator[None]:
    """The setting that every command makes, which `exact_fp32` forbids."""
    monkeypatch.undo()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_is_judged_at_the_limit_of_fp32(
    chat_base, tmp_path, monkeypatch, medium_products, precision
) -> None:
    """The fault is far below what bf16 rounds."""
    finish = classifiers.finish
    monkeypatch.setattr(classifiers, "finish", lambda *given: finish(*given[:-1], 1.002 * given[-1]))
    config = training(tmp_path, chat_base, pairs())
    with pytest.raises(RunFailed, match="the written model is not the trained one"):
        reward_trainer.train_reward(replace(config, run=replace(config.run, precision=precision)))


def test_scoring_in_fp32_is_judged_at_the_limit_of_fp32(chat_reward, tmp_path, medium_products) -> None:
    judge(chat_reward)
    folder = changed(chat_reward, tmp_path / "reward", lambda place: other_weights(place, 1.002))
    with pytest.raises(ConfigError, match="its weights have changed"):
        judge(folder)


def test_a_sound_model_that_bf16_rounds_much_is_written(chat_base, tmp_path, monkeypatch) -> None:
    """Its scores are small sums of large terms. In a run, it is refused in bf16 and scores in fp32."""
    load = classifiers.load

    def cancelling(*given):
        model = load(*given)
        with torch.no_grad():
            model.transformer.ln_f.bias.fill_(200.0)
            model.score.weight.sub_(model.score.weight.mean())
        return model

    monkeypatch.setattr(classifiers, "load", cancelling)
    config = training(tmp_path, chat_base, pairs())
    config = replace(config, run=replace(config.run, precision="bf16"), optim=replace(config.optim, lr=1e-6))
    reward_trainer.train_reward(config)
    judge(tmp_path / "reward")
    with pytest.raises(ConfigError, match=r"bfloat16 rounds too much.*set reward\.dtype=fp32"):
        judge(tmp_path / "reward", dtype="bf16")


# Padding and limits


def test_the_side_that_a_folder_pads_on_changes_no_score(classifier_folder, gpt2_classifier_folder, tmp_path) -> None:
    for number, folder in enumerate((classifier_folder, gpt2_classifier_folder)):
        place = tmp_path / str(number)
        shutil.copytree(folder, place)
        settings = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
        label = {"label": "POSITIVE"} if number == 0 else {}
        left, right = judge(place, **label), judge(folder, **label)
        assert AutoTokenizer.from_pretrained(place).padding_side == "left"
        assert left([""] * 8, TEXTS) == pytest.approx(right([""] * 8, TEXTS), abs=1e-5)
        assert left([""] * 8, TEXTS) == pytest.approx([left([""], [text])[0] for text in TEXTS], abs=1e-5)


def test_reward_training_pads_on_the_right_whatever_the_folder_says(chat_base, tmp_path) -> None:
    tokenizer = classifiers.load_tokenizer(str(chat_base), "it", trust_remote_code=False)
    assert tokenizer.padding_side == "left"
    classifiers.load(training(tmp_path, chat_base, pairs()), tokenizer, ("score",))
    rows = [{"input_ids": ids, "labels": 0.0} for ids in ([5, 6], [5, 6, 7])]
    assert feedback_trainer._Collator(tokenizer)(rows)["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_a_text_that_holds_the_padding_token_scores_as_alone(gpt2_classifier_folder) -> None:
    """PAD is EOS: the head looks for the last token that is neither."""
    model = judge(gpt2_classifier_folder)
    texts = ["A film.<|endoftext|>", "A <|endoftext|> film<|endoftext|><|endoftext|>", *TEXTS]
    assert model([""] * len(texts), texts) == pytest.approx([model([""], [text])[0] for text in texts], abs=1e-5)


def test_a_model_that_reads_its_padding_is_refused_but_one_text_at_a_time(gpt2_classifier_folder, monkeypatch) -> None:
    def left(model, tokenizer):
        tokenizer.padding_side = "left"
        model.config.pad_token_id = tokenizer.pad_token_id

    monkeypatch.setattr(classifier, "settle_padding", left)
    with pytest.raises(ConfigError, match=r"score changes by .* with the texts that it is padded with") as caught:
        judge(gpt2_classifier_folder)
    assert caught.value.key == "reward.batch_size"
    judge(gpt2_classifier_folder, batch_size=1)


_TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
_GPT = {"vocab_size": 50, "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 1}
_XLNET = {"vocab_size": 50, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "pad_token_id": 1}
_GEMMA3 = {
    "text_config": {**_TINY, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0},
    "vision_config": {
        **dict.fromkeys(("hidden_size", "intermediate_size"), 16),
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    },
}
_BART = {
    **{"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
}


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("Bert", _TINY, 40),
        ("Electra", _TINY, 40),
        ("DebertaV2", _TINY, 40),
        ("DistilBert", {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 40}, 40),
        ("Roberta", _TINY, 38),
        ("XLMRoberta", _TINY, 38),
        ("Camembert", _TINY, 38),
        ("MPNet", _TINY, 38),
        ("Longformer", {**_TINY, "attention_window": 4}, 38),
        ("Data2VecText", _TINY, 38),
        ("IBert", _TINY, 38),
        ("Esm", {**_TINY, "position_embedding_type": "absolute", "mask_token_id": 4}, 38),
        ("Roberta", {**_TINY, "pad_token_id": 4}, 35),
        ("XLNet", _XLNET, None),
        ("GPT2", _GPT, 40),
        ("OPT", {**_TINY, "word_embed_proj_dim": 16, "ffn_dim": 16}, 40),
        ("Bloom", {"vocab_size": 50, "hidden_size": 16, "n_layer": 1, "n_head": 2}, None),
        ("Mpt", {"vocab_size": 50, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 40}, 40),
        ("Bart", _BART, 40),
        ("Gemma3", _GEMMA3, 40),
    ],
)
def test_length_limits_and_padding_of_families(family, settings, limit) -> None:
    """The longest text that is let through runs, and no text's score depends on what it is padded with."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings, num_labels=2)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    tokenizer = make_tokenizer(300, eos_token="</s>", pad_token="<pad>")
    tokenizer.model_max_length = 10**30
    classifiers.settle_padding(model, tokenizer)
    assert classifiers.most_tokens(model, tokenizer) == (limit or 10**30)
    computed = ("XLNet", "Bloom", "Mpt", "Gemma3")  # relative, ALiBi or rotary
    assert classifiers.has_position_table(model) == (family not in computed)

    def logits(*lengths: int) -> torch.Tensor:
        ids = [[5 + i % 40 for i in range(n - 1)] + [2] for n in lengths]  # 2: BART's end
        with torch.no_grad():
            return model(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits

    assert tokenizer.pad_token_id in (1, model.config.get_text_config().pad_token_id)
    together = logits(3, 9, limit or 60)
    torch.testing.assert_close(together, torch.cat([logits(n) for n in (3, 9, limit or 60)]), atol=1e-5, rtol=1e-4)


def test_a_limit_that_the_model_does_not_have_is_found_at_the_start(classifier_folder, monkeypatch) -> None:
    monkeypatch.setattr(classifier, "most_tokens", lambda model, tokenizer: 66)
    with pytest.raises(ConfigError, match="cannot read a text of 66 tokens") as caught:
        judge(classifier_folder, label="POSITIVE")
    assert caught.value.facts == {"tokens": 66}


def test_the_text_that_is_tried_is_no_longer_than_the_run_sends(classifier_folder, monkeypatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(classifier_checks, "_check_finite", lambda judge, rows: tried.append(len(rows[0]["input_ids"])))

    def longest(sample_tokens: tuple[int, int] | None) -> int:
        tried.clear()
        config = RewardConfig(model="m", label="POSITIVE", dtype="fp32")
        return max(Classifier(config, str(classifier_folder), CPU, sample_tokens=sample_tokens) and tried)

    assert [longest(None), longest((60, 60)), longest((8, 6))] == [64, 64, 28]
    monkeypatch.setattr(classifier_checks, "has_position_table", lambda model: False)
    assert longest(None) < 28


def test_a_full_gpu_is_not_called_a_limit_of_the_model(classifier_folder, monkeypatch) -> None:
    def full(judge, rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(classifier_checks, "_check_finite", full)
    with pytest.raises(torch.OutOfMemoryError):
        judge(classifier_folder, label="POSITIVE")


def test_every_config_that_knows_a_padding_id_gets_ours() -> None:
    model = transformers.Gemma3ForSequenceClassification(transformers.Gemma3Config(**_GEMMA3, num_labels=1))
    tokenizer = make_tokenizer(300, eos_token="</s>", pad_token="<pad>")
    tokenizer.pad_token_id = 7
    classifiers.settle_padding(model, tokenizer)
    assert model.config.pad_token_id == model.config.text_config.pad_token_id == 7
    xlnet = transformers.XLNetForSequenceClassification(XLNetConfig(**_XLNET))
    classifiers.settle_padding(xlnet, tokenizer)
    assert tokenizer.padding_side == "left"


# BOS


def test_what_the_tokenizer_puts_around_a_text_is_there_once(chat_base) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    assert reward_texts.around(tokenizer) == ("<s>", "")
    rows, _ = reward_texts.encode(tokenizer, ["<s>A film.", "A film."], 40)
    assert rows[0] == rows[1]
    assert rows[0]["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_prompt_that_begins_with_bos_scores_as_one_without(chat_base) -> None:
    model = judge(chat_base)
    assert model(["<s>A film"], [" is good."]) == model(["A film"], [" is good."])


# Labels, dtypes, devices


def test_a_label_is_a_name_before_it_is_a_number(classifier_folder, tmp_path) -> None:
    config = transformers.RobertaConfig.from_pretrained(classifier_folder)
    config.id2label, config.label2id = {0: "-1", 1: "0", 2: "1"}, {"-1": 0, "0": 1, "1": 2}
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(classifier_folder).save_pretrained(tmp_path)
    found = {label: (judge(tmp_path, label=label).label, judge(tmp_path, label=label).label_found) for label in "012"}
    assert found == {
        "0": (1, "found by its name"),
        "1": (2, "found by its name"),
        "2": (2, "found by its number, as no label has that name"),
    }
    said = check_classifier("reward.model=x", 1.0, judge(tmp_path, label="1"))
    assert said == ("ok", "reward.model=x scores by 1 (output 2, found by its name)")


@pytest.mark.parametrize(
    ("stored", "native", "device", "expected"),
    [
        (torch.bfloat16, True, "cuda", torch.bfloat16),
        (torch.bfloat16, False, "cuda", torch.float32),
        (torch.float16, True, "cuda", torch.float16),
        (torch.float32, True, "cuda", torch.float16),
        (torch.bfloat16, False, "cpu", torch.float32),
    ],
)
def test_weights_in_bf16_are_never_read_in_fp16(monkeypatch, stored, native, device, expected) -> None:
    monkeypatch.setattr(classifier, "computes_in_bf16", lambda _: native)
    assert classifier.reward_dtype(RewardConfig(), torch.device(device), stored) == expected
    assert classifier.reward_dtype(RewardConfig(dtype="fp16"), torch.device(device), stored) == torch.float16


def test_the_dtype_that_weights_are_stored_in(classifier_folder, tmp_path, monkeypatch) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier_folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert classifiers.stored_dtype(str(tmp_path)) == torch.bfloat16
    assert classifiers.stored_dtype(str(classifier_folder)) == torch.float32
    assert classifiers.stored_dtype(str(tmp_path / "nowhere")) is None


def test_a_model_that_was_trained_in_bf16_is_not_read_in_fp16(chat_reward, tmp_path, monkeypatch) -> None:
    """Its weights are stored in fp32, and its activations may be what fp16 cannot hold."""
    record = reward_texts.read(str(chat_reward), "it")
    shutil.copytree(chat_reward, tmp_path / "reward")
    reward_texts.write(tmp_path / "reward", replace(record, precision="bf16"))
    seen: list[torch.dtype | None] = []
    real = classifier.reward_dtype
    monkeypatch.setattr(classifier, "reward_dtype", lambda *given: seen.append(given[2]) or real(*given))
    judge(tmp_path / "reward")
    judge(chat_reward)
    assert seen == [torch.bfloat16, torch.float32]


def test_reward_training_follows_the_launch_to_the_cpu(chat_base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    seen: dict[str, object] = {}

    def noted(**given: object) -> object:
        seen.update(given)
        return type("Arguments", (), {"deepspeed_plugin": None})()

    noted.__dataclass_fields__ = {"train_sampling_strategy": None}  # type: ignore[attr-defined]
    monkeypatch.setattr(feedback_trainer, "TrainingArguments", noted)
    config = training(tmp_path, chat_base, pairs())
    for said, expected in (("true", (True, 8)), ("True", (True, 8)), ("false", (False, 2))):
        monkeypatch.setenv("ACCELERATE_USE_CPU", said)
        assert arithmetic.has_gpu() is not expected[0]
        feedback_trainer.training_arguments(config, str(tmp_path))
        assert (seen["use_cpu"], seen["per_device_train_batch_size"]) == expected


# What a run says


def test_a_run_warns_of_a_response_that_goes_unread_and_counts_what_was_cut(tiny, classifier_folder, capsys) -> None:
    """The classifier reads 8 tokens of the texts, and a prompt of 6 of the policy's may be more than that."""
    tokenizer = AutoTokenizer.from_pretrained(classifier_folder)
    tokenizer.model_max_length = 8
    folder = Path(tiny().run.output_dir).parent / "short"
    shutil.copytree(classifier_folder, folder)
    tokenizer.save_pretrained(folder)
    settings = {"model": str(folder), "label": "POSITIVE", "dtype": "fp32", "function": []}
    trainer = PPOTrainer(tiny(run={**vars(tiny().run), "total_steps": 1, "eval_samples": 0}, reward=settings))
    summary = trainer.fit()
    said = capsys.readouterr().out
    assert f"warning: reward.model={folder} reads 8 tokens, and samples have up to 14 of the policy's" in said
    counts = summary["cut_texts"][f"reward.model={folder}"]
    assert 0 < counts["cut"] <= counts["read"] and counts["unread"] <= counts["cut"]
    assert said.count(f"cut {counts['cut']} of {counts['read']} texts") == 1


def test_nothing_of_a_response_is_read_behind_a_long_prompt(classifier_folder) -> None:
    model = judge(classifier_folder, label="POSITIVE")
    model.read = model.cut = model.unread = 0
    model(["a film " * 60, "A film", "a film " * 60 + TEXTS[0]], [TEXTS[0], TEXTS[1], ""])
    assert (model.read, model.cut, model.unread) == (3, 2, 2)
    model(["a film"], ["a film " * 60])
    assert (model.read, model.cut, model.unread) == (4, 3, 2)


def test_a_classifier_from_elsewhere_with_a_chat_template_is_said(chat_base, chat_reward) -> None:
    def said(folder: Path, **settings: str) -> list[str]:
        config = RewardConfig(model=str(folder), dtype="fp32", **settings)  # type: ignore[arg-type]
        return [line for _, line in cautions(load_reward(config, str(folder), CPU), 4, 4)]

    (line,) = said(chat_base)
    assert "has a chat template and no record" in line and "set reward.format=chat" in line
    assert said(chat_base, format="plain") == said(chat_base, format="chat") == said(chat_reward) == []
    (line,) = said(chat_reward, format="plain")
    assert "was trained on chat texts" in line
