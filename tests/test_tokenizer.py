"""Text becomes ids and ids become text without losing a token, a space or a character on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_accel.algorithm.batches import Sequences
from rlhf_accel.data.tokenizer import StopCondition, Tokens
from rlhf_accel.system.errors import ConfigError
from tests.conftest import make_tokenizer


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> Tokens:
    return Tokens.load(str(gpt2_folder))


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Tokens:
    return Tokens.load(str(llama_folder))


def byte_tokens(**special: str) -> Tokens:
    """One token for every byte: each character beyond ASCII takes several."""
    return Tokens(make_tokenizer(256 + len(set(special.values())), **special))


def word_tokens(*pieces: str) -> Tokens:
    """Pieces as SentencePiece writes them, `▁` for a space; the decoder strips the space before the first word."""
    vocab = {"<unk>": 0, "</s>": 1, **{piece: i for i, piece in enumerate(pieces, start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return Tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"))


def llama2_tokens() -> Tokens:
    """As Llama 2's: a space before every text, BOS from a post-processor, bytes where a character is not known."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a", "▁good", "日"]
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokens(tokens)


def with_template(single: str, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts these special tokens around every text `$A`."""
    tokenizer = make_tokenizer(330, **special)
    named = [(name, tokenizer.convert_tokens_to_ids(name)) for name in set(single.split()) - {"$A"}]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=named)
    return tokenizer


def as_sequences(tokens: Tokens, queries: list[list[int]], responses: list[list[int]]) -> Sequences:
    ids, mask = tokens.pad_left(queries)
    length = max(map(len, responses))
    padded = torch.tensor([row + [tokens.pad_id] * (length - len(row)) for row in responses]).reshape(-1, length)
    counts = torch.tensor([[i < len(row) for i in range(length)] for row in responses]).reshape(-1, length)
    return Sequences(queries=ids, query_mask=mask, responses=padded, response_mask=counts)


def decoded(tokens: Tokens, query: list[int], response: list[int]) -> tuple[str, str]:
    prompts, responses = tokens.decode(as_sequences(tokens, [query], [response]))
    return prompts[0], responses[0]


def last_token_ends(stop: StopCondition, ids: list[int]) -> list[bool]:
    """What the condition says after each of these tokens."""
    return [bool(stop(torch.tensor([ids[:t]]))[0]) for t in range(1, len(ids) + 1)]


def test_bos_comes_before_every_text_once(llama: Tokens, gpt2: Tokens) -> None:
    bos = llama.tokenizer.bos_token_id
    # A fast tokenizer made from a vocabulary alone adds no BOS of its own, so that one is asked to.
    asked = make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    asked.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", asked.bos_token_id), ("</s>", asked.eos_token_id)]
    )
    tokens = Tokens(asked)
    assert tokens.prefix == [asked.bos_token_id]
    rows = tokens.encode(["A dull film", "good", ""])
    plain = asked(["A dull film", "good", ""], add_special_tokens=False)["input_ids"]
    # The EOS that it appends would end every prompt before it began.
    assert rows == [[asked.bos_token_id, *ids] for ids in plain]
    assert llama.prefix == [] and bos not in llama.encode(["good"])[0]
    assert gpt2.prefix == []


def test_an_eos_that_the_tokenizer_appends_is_no_prefix() -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert Tokens(tokenizer).prefix == []
    assert tokenizer.eos_token_id not in Tokens(tokenizer).encode(["good"])[0]


@pytest.mark.parametrize(
    ("single", "prefix"), [("[gMASK] <sop> $A", "[gMASK] <sop>"), ("[CLS] $A [SEP]", "[CLS]"), ("$A </s>", "")]
)
def test_a_prefix_is_kept_whole_and_comes_once(single: str, prefix: str) -> None:
    special = {
        "bos_token": "<sop>",
        "eos_token": "</s>",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[gMASK]",
    }
    tokenizer = with_template(single, **special)
    tokens = Tokens(tokenizer)
    before = tokenizer.convert_tokens_to_ids(prefix.split())
    plain = tokenizer(["good", " film"], add_special_tokens=False)["input_ids"]
    assert tokens.prefix == before
    assert tokens.encode(["good", " film"]) == [before + ids for ids in plain]
    # As a chat template writes it: the whole prefix, or its end.
    for own in ("".join(prefix.split()), prefix.rpartition(" ")[2]):
        assert tokens.encode([own + "good"]) == [before + plain[0]]


def test_the_space_before_a_text_is_not_its_prefix() -> None:
    tokens = llama2_tokens()
    assert tokens.prefix == [1]
    assert tokens.encode(["good a"]) == tokens.tokenizer(["good a"])["input_ids"] == tokens.encode(["<s>good a"])


def test_bytes_of_unknown_characters_break_nothing_but_the_one_cut_off() -> None:
    tokens = llama2_tokens()
    ids = tokens.encode(["good 本語"])[0]
    assert len(ids) == 3 + 6, "six bytes for two characters"
    assert tokens.tokenizer.decode(ids[:-1], skip_special_tokens=True) == "good " + 5 * "\N{REPLACEMENT CHARACTER}"
    assert [tokens.text(ids[:-cut]) for cut in (1, 2)] == ["good 本\N{REPLACEMENT CHARACTER}"] * 2
    for cut in range(3, len(ids)):
        prompt, response = decoded(tokens, ids[:cut], ids[cut:])
        assert prompt == "good 本"[: 5 + (cut >= 6)] and prompt + response == "good 本語"
    assert decoded(tokens, ids[:6], ids[6:8]) == ("good 本", "\N{REPLACEMENT CHARACTER}")


def test_encode_of_nothing(gpt2: Tokens) -> None:
    assert gpt2.encode([]) == []


def test_encode_decode_is_the_text(gpt2: Tokens, llama: Tokens) -> None:
    texts = ["A dull, tired story.", "  two  spaces ", "naïve café 日本 🎬\n\ttab"]
    for tokens in (gpt2, llama):
        assert [tokens.text(ids) for ids in tokens.encode(texts)] == texts


def test_a_text_longer_than_the_context_is_no_warning(gpt2: Tokens, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    transformers.utils.logging.enable_propagation()
    try:
        gpt2.tokenizer.deprecation_warnings.pop("sequence-length-is-longer-than-the-specified-maximum", None)
        assert len(gpt2.encode(["good film " * 200])[0]) > gpt2.tokenizer.model_max_length
    finally:
        transformers.utils.logging.disable_propagation()
    assert caplog.text == ""


def test_pad_is_the_tokenizers_own_else_eos_else_the_first_id(gpt2: Tokens, llama: Tokens) -> None:
    assert llama.pad_id == llama.tokenizer.pad_token_id != llama.eos_id
    assert gpt2.tokenizer.pad_token_id is None
    assert gpt2.pad_id == gpt2.eos_id == gpt2.tokenizer.eos_token_id
    assert Tokens(make_tokenizer(bos_token="<s>")).pad_id == 0
    assert Tokens(make_tokenizer(bos_token="<s>")).eos_id is None


def test_padding_goes_on_the_left_and_the_mask_says_where(gpt2: Tokens) -> None:
    ids, mask = gpt2.pad_left([[5], [6, gpt2.eos_id, 8]])
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids.tolist() == [[gpt2.pad_id, gpt2.pad_id, 5], [6, gpt2.eos_id, 8]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    assert gpt2.pad_left([])[0].shape == (0, 1)


def test_a_prompt_without_tokens_is_refused(gpt2: Tokens) -> None:
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        gpt2.pad_left([[5], []])


def test_a_response_keeps_the_space_that_its_tokenizer_strips() -> None:
    tokens = word_tokens("▁a", "▁good", "▁film", "s")
    a, good, film, s = range(2, 6)
    assert tokens.text([good, film]) == "good film", "this tokenizer strips the first space"
    assert decoded(tokens, [a], [good, film, s]) == ("a", " good films")


def test_a_character_split_over_the_tokens_of_a_response() -> None:
    tokens = byte_tokens(eos_token="<|e|>")
    ids = tokens.encode(["日本"])[0]
    assert len(ids) == 6
    assert decoded(tokens, tokens.encode(["in "])[0], ids) == ("in ", "日本")


@pytest.mark.parametrize("cut", range(1, 9))
def test_prompt_and_response_are_the_decoded_whole_wherever_they_are_cut(cut: int) -> None:
    tokens = byte_tokens(eos_token="<|e|>")
    ids = tokens.encode(["aé日🎬b"])[0]
    prompt, response = decoded(tokens, ids[:cut], ids[cut:])
    assert prompt + response == "aé日🎬b"
    # A character whose bytes lie on both sides belongs to the response, whole.
    assert "\N{REPLACEMENT CHARACTER}" not in prompt + response


def test_a_response_that_ends_inside_a_character() -> None:
    tokens = byte_tokens(eos_token="<|e|>")
    ids = tokens.encode(["aé"])[0]
    assert decoded(tokens, ids[:1], ids[1:2]) == ("a", "\N{REPLACEMENT CHARACTER}")


def test_decoding_leaves_out_padding_and_special_tokens(gpt2: Tokens) -> None:
    # PAD is EOS here: only the mask tells the stop token from the padding after it.
    one, two = gpt2.encode(["A good"])[0], gpt2.encode([" film"])[0]
    sequences = as_sequences(gpt2, [one, one[:1]], [[*two, gpt2.eos_id], two[:1]])
    prompts, responses = gpt2.decode(sequences)
    assert prompts == ("A good", gpt2.text(one[:1]))
    assert responses == (" film", gpt2.text(one[:1] + two[:1])[len(prompts[1]) :])


def test_eos_and_extra_ids_end_a_response(llama: Tokens) -> None:
    stop = llama.stop_condition((), extra_ids=[7])
    assert llama.eos_id in stop.ids and 7 in stop.ids and stop.texts == ()
    rows = torch.tensor([[4, 5, llama.eos_id], [4, 5, 7], [llama.eos_id, 7, 5], [7, 7, llama.pad_id]])
    assert stop(rows).tolist() == [True, True, False, False]


def test_a_tokenizer_without_eos_never_stops_by_itself() -> None:
    stop = Tokens(make_tokenizer(bos_token="<s>")).stop_condition(())
    assert stop.ids == ()
    assert stop(torch.tensor([[0], [1]])).tolist() == [False, False]


def test_a_special_token_given_as_text_is_matched_as_a_token() -> None:
    tokens = byte_tokens(eos_token="</s>", sep_token="<|im_end|>")
    stop = tokens.stop_condition(["<|im_end|>"])
    assert set(stop.ids) == {tokens.eos_id, tokens.tokenizer.sep_token_id} and stop.texts == ()
    assert stop(torch.tensor([[tokens.tokenizer.sep_token_id]])).tolist() == [True]


@pytest.mark.parametrize("is_special", [True, False])
def test_an_added_token_that_no_role_names_is_matched_as_a_token(is_special: bool) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=is_special)])
    assert "<|eot_id|>" not in tokenizer.all_special_tokens
    tokens, eot = Tokens(tokenizer), tokenizer.convert_tokens_to_ids("<|eot_id|>")
    stop = tokens.stop_condition(["<|eot_id|>"])
    assert set(stop.ids) == {tokens.eos_id, eot}, "so that min_new_tokens keeps it from being sampled"
    assert stop(torch.tensor([[5, eot], [eot, 5]])).tolist() == [True, False]
    # What is matched as a token alone is what texts do not show.
    assert tokens.text([eot]) == ("" if is_special else "<|eot_id|>")
    assert stop.texts == (() if is_special else ("<|eot_id|>",))


def test_a_special_token_within_a_stop_text_is_refused() -> None:
    tokens = byte_tokens(eos_token="</s>", sep_token="<|im_end|>")
    with pytest.raises(
        ConfigError, match=r"^rollout\.stop contains '<\|im_end\|>\\n' .*special token <\|im_end\|>"
    ) as caught:
        tokens.stop_condition(["<|im_end|>\n"])
    assert caught.value.key == "rollout.stop" and caught.value.facts == {"token": "<|im_end|>"}


def responses_end(tokens: Tokens, stop: list[str], prompt: list[int], response: list[int]) -> list[bool]:
    """After each token of the response, whether the condition ends it, which this prompt comes before."""
    condition = tokens.stop_condition(stop).after(*tokens.pad_left([prompt, [5, 6, *prompt]]))
    ends = [condition(torch.tensor([response[:t]] * 2)).tolist() for t in range(1, len(response) + 1)]
    assert all(one == other for one, other in ends)
    for t, (ended, _) in enumerate(ends, start=1):
        # A first stop text is found where the text that rewards read holds it.
        if not any(one for one, _ in ends[: t - 1]):
            assert ended == any(text in decoded(tokens, prompt, response[:t])[1] for text in stop)
    return [one for one, _ in ends]


def test_a_stop_text_with_a_space_where_the_response_begins() -> None:
    tokens = word_tokens("▁a", "▁good", "▁film", "s")
    a, good, film, s = range(2, 6)
    assert responses_end(tokens, [" good"], [a], [good, film]) == [True, False]
    assert responses_end(tokens, [" films"], [a], [film, s]) == [False, True]
    assert responses_end(tokens, ["a good"], [a], [good, film]) == [False, False], "it begins in the prompt"
    llama2 = llama2_tokens()
    good, a = llama2.encode(["good"])[0], llama2.encode(["a a"])[0][1:]
    assert responses_end(llama2, [" a"], good, a) == [True, True]


def test_a_stop_text_in_bytes_of_unknown_characters() -> None:
    tokens = llama2_tokens()
    ids = tokens.encode(["good 本語" + "本" * 20 + "終"])[0]
    assert responses_end(tokens, ["終"], ids[:4], ids[4:]) == [False] * (len(ids) - 5) + [True]
    # A prompt that ends within a character, whose rest is the response's.
    assert responses_end(tokens, ["語"], ids[:7], ids[7:9]) == [False, True]
    # One that stood there before min_new_tokens does not count again when the next character is complete.
    assert responses_end(tokens, ["本"], ids[:3], ids[3:9]) == [False, False, True, False, False, False]


def test_a_stop_text_among_special_tokens_that_are_not_shown() -> None:
    tokens = byte_tokens(eos_token="<|e|>", sep_token="<|s|>")
    x, dot = tokens.encode(["x"])[0], tokens.encode(["."])[0]
    response = [*x, *[tokens.tokenizer.sep_token_id] * 20, *dot, tokens.tokenizer.sep_token_id]
    assert responses_end(tokens, ["x."], x, response) == [False] * 21 + [True, False]


def test_a_stop_text_may_span_tokens_and_lie_within_one(gpt2: Tokens) -> None:
    tokens = byte_tokens(eos_token="<|e|>")
    stop = tokens.stop_condition(["end."])
    assert last_token_ends(stop, tokens.encode(["the end. x"])[0]) == [False] * 7 + [True] + [False] * 2
    film = gpt2.encode([" film"])[0]
    assert len(film) < 5, "a token of this tokenizer holds several letters"
    assert last_token_ends(gpt2.stop_condition(["il"]), film).count(True) == 1


def test_a_stop_text_of_characters_split_over_tokens() -> None:
    tokens = byte_tokens(eos_token="<|e|>")
    ids = tokens.encode(["aé日"])[0]
    assert last_token_ends(tokens.stop_condition(["é日"]), ids) == [False] * 5 + [True]


@pytest.mark.parametrize("text", ["🎬🎬🎬", "a" * 40])
def test_a_long_stop_text_in_a_long_response(text: str) -> None:
    tokens = byte_tokens(eos_token="<|e|>")
    ids = tokens.encode(["x" * 300 + text])[0]
    assert bool(tokens.stop_condition([text])(torch.tensor([ids]))[0])
    assert not bool(tokens.stop_condition([text])(torch.tensor([ids[:-1]]))[0])


def test_a_stop_text_from_before_min_new_tokens_does_not_end_later_tokens() -> None:
    tokens = byte_tokens(eos_token="<|e|>")
    stop = tokens.stop_condition(["."])
    assert last_token_ends(stop, tokens.encode([".ab"])[0]) == [True, False, False]
    # The loop does not ask before min_new_tokens. A second one, near the first, is one again.
    assert last_token_ends(stop, tokens.encode([".a.b..c"])[0]) == [True, False, True, False, True, True, False]


def test_overlapping_stop_texts_end_again() -> None:
    tokens = byte_tokens(eos_token="<|e|>")
    assert last_token_ends(tokens.stop_condition(["\n\n"]), tokens.encode(["\n\n\n"])[0]) == [False, True, True]


def test_a_special_token_does_not_bring_an_old_stop_text_back() -> None:
    tokens = byte_tokens(eos_token="<|e|>", sep_token="<|s|>")
    ids = [*tokens.encode(["."])[0], tokens.tokenizer.sep_token_id]
    assert last_token_ends(tokens.stop_condition(["."]), ids) == [True, False]


def test_rows_are_told_apart() -> None:
    tokens = byte_tokens(eos_token="<|e|>")
    rows = torch.tensor(tokens.encode(["ab.", "a.b", "..."]))
    assert tokens.stop_condition([".", "zz"])(rows).tolist() == [True, False, True]


def config_only(folder: Path) -> str:
    folder.mkdir()
    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1)).config.save_pretrained(
        folder
    )
    return str(folder)


def test_a_model_folder_without_a_tokenizer(tmp_path: Path, llama_folder: Path) -> None:
    # For GPT-2 transformers makes up an empty tokenizer, for Llama it raises.
    bare = tmp_path / "llama"
    bare.mkdir()
    (bare / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    for folder in (config_only(tmp_path / "gpt2"), str(bare), str(tmp_path / "nothing")):
        message = f"^model.name_or_path={folder}: .*no tokenizer.*save one beside"
        with pytest.raises(ConfigError, match=message) as caught:
            Tokens.load(folder)
        assert len(str(caught.value).splitlines()) == 1


def test_a_broken_tokenizer_file(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^model\.name_or_path="):
        Tokens.load(folder)


def test_save_and_load_again(llama: Tokens, tmp_path: Path) -> None:
    llama.save(tmp_path)
    again = Tokens.load(str(tmp_path))
    assert len(again) == len(llama)
    assert (again.pad_id, again.eos_id, again.prefix) == (llama.pad_id, llama.eos_id, llama.prefix)
    assert again.encode(["A good film"]) == llama.encode(["A good film"])
