"""Text to ids and back, streaming text, and when two tokenizers are the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipespec.errors import ConfigError, DataError, ModelLoadError
from pipespec.tokenizer import (
    ByteTokenizer,
    StreamDecoder,
    TextTokenizer,
    check_same_tokenizer,
    load_tokenizer,
    token_lengths,
)

CORPUS = ["def add(a, b):\n    return a + b", "the quick brown fox", "naïve café, 你好 😀"] * 4
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def trained() -> Backend:
    """A byte-level BPE of 300 ids with a begin and an end token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer=trainer)
    return backend


def sentencepiece_like() -> Backend:
    """As Llama 2 decodes: word marks, byte fallback, and no space before the first word."""
    words = ["▁the", "▁fox", "▁", "a", "b", "\n"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


BYTE_LEVEL_JSON = trained().to_str()
SENTENCEPIECE_JSON = sentencepiece_like().to_str()


def save(folder: Path, text: str, **settings_: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(save(tmp_path_factory.mktemp("byte-level"), BYTE_LEVEL_JSON))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_tokenizer(save(tmp_path_factory.mktemp("sentencepiece"), SENTENCEPIECE_JSON))


# Encoding and decoding


@pytest.mark.parametrize("text", ["", "def f(x):\n\treturn 1", "naïve 你好 😀", "a\x00b"])
def test_text_comes_back_from_its_ids(byte_level: TextTokenizer, text: str) -> None:
    for tokenizer in (byte_level, ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_of_added_tokens_count(tmp_path: Path, byte_level: TextTokenizer) -> None:
    assert byte_level.num_ids == 300
    backend = Backend.from_str(BYTE_LEVEL_JSON)
    backend.add_special_tokens(["<pad>"])
    more = load_tokenizer(save(tmp_path, backend.to_str()))
    assert more.num_ids == 301
    assert more.special_ids == {0, 1, 300}
    assert more.decode([300]) == ""
    assert more.decode([300], skip_special_tokens=False) == "<pad>"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    backend = Backend.from_str(BYTE_LEVEL_JSON)
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    tokenizer = load_tokenizer(save(tmp_path, backend.to_str()))
    assert len(tokenizer.encode("zq" * 10)) == 20


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({}, ["<s>", "q"]),
        ({"add_bos_token": True}, ["<s>", "q"]),
        ({"add_bos_token": False}, ["q"]),
        ({"add_bos_token": False, "add_eos_token": True}, ["q", "</s>"]),
        ({"add_bos_token": True, "bos_token": None}, ["q"]),
    ],
)
def test_the_begin_token_is_what_transformers_would_add(
    tmp_path: Path, settings_: dict[str, Any], expected: list[str]
) -> None:
    backend = Backend.from_str(BYTE_LEVEL_JSON)
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 0)]
    )
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", **settings_}
    tokenizer = load_tokenizer(save(tmp_path, backend.to_str(), **names))
    ids = [backend.token_to_id(token) for token in expected]
    assert tokenizer.encode("q") == ids
    assert tokenizer.encode("q", add_special_tokens=False) == [backend.token_to_id("q")]


def test_it_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    folder = save(tmp_path, BYTE_LEVEL_JSON, **named, clean_up_tokenization_spaces=False)
    reference, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in (*CORPUS[:3], "  two  spaces , and . marks "):
        ids = reference.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_half_a_surrogate_pair_is_refused(byte_level: TextTokenizer) -> None:
    for tokenizer in (byte_level, ByteTokenizer()):
        with pytest.raises(DataError, match="character 2 is half of a surrogate pair"):
            tokenizer.encode("ab\ud800")


def test_end_ids_come_from_the_model_then_from_the_tokenizer(tmp_path: Path) -> None:
    folder = save(tmp_path, BYTE_LEVEL_JSON, eos_token="</s>")
    assert load_tokenizer(folder).eos_ids == (1,)
    (folder / "config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_tokenizer(folder).eos_ids == (5, 6)
    assert ByteTokenizer().eos_ids == (256,)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("README.md", "", "has no tokenizer.json"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(
    tmp_path: Path, name: str, text: str, part: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelLoadError, match=part) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Chat templates


def test_a_conversation_is_rendered_by_the_template(tmp_path: Path) -> None:
    folder = save(
        tmp_path,
        BYTE_LEVEL_JSON,
        tokenizer_class="PreTrainedTokenizerFast",
        chat_template=TEMPLATE,
    )
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "<user>hi"
    assert tokenizer.render_chat(messages, add_generation_prompt=True) == "<user>hi<assistant>"


def test_a_template_that_refuses_is_one_line(tmp_path: Path) -> None:
    refusing = "{{ raise_exception('roles must\nalternate') }}"
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": refusing}
    tokenizer = load_tokenizer(save(tmp_path / "strict", BYTE_LEVEL_JSON, **named))
    with pytest.raises(DataError, match=r"template of strict refuses.*roles must alternate"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)


def test_a_model_without_template_says_so(byte_level: TextTokenizer) -> None:
    assert not byte_level.has_chat_template
    with pytest.raises(DataError, match="has no chat template"):
        byte_level.render_chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)


# Sameness


Change = Callable[[dict[str, Any]], None]


def variant(folder: Path, change: Change, **settings_: Any) -> TextTokenizer:
    """The trained tokenizer with its file changed."""
    values = json.loads(BYTE_LEVEL_JSON)
    change(values)
    return load_tokenizer(save(folder, json.dumps(values), **settings_))


def rewrite_merges(values: dict[str, Any]) -> None:
    values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]


def change_flags(values: dict[str, Any]) -> None:
    for token in values["added_tokens"]:
        token.update(special=False, normalized=True, lstrip=True)


def change_frame(values: dict[str, Any]) -> None:
    values["normalizer"] = {"type": "NFC"}
    values["post_processor"] = None
    values["truncation"] = None


@pytest.mark.parametrize("change", [rewrite_merges, change_flags, change_frame])
def test_noise_between_repositories_of_a_family_is_ignored(
    tmp_path: Path, byte_level: TextTokenizer, change: Change
) -> None:
    noisy = variant(tmp_path, change, chat_template=TEMPLATE, bos_token="<s>")
    assert noisy.digest == byte_level.digest
    check_same_tokenizer([("Llama-3.2-1B", noisy), ("Llama-3.1-8B", byte_level)])


def swap_tokens(values: dict[str, Any]) -> None:
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def swap_merges(values: dict[str, Any]) -> None:
    merges = values["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def drop_merge(values: dict[str, Any]) -> None:
    values["model"]["merges"].pop()


def rename_special(values: dict[str, Any]) -> None:
    values["added_tokens"][1]["content"] = "<eot>"
    values["model"]["vocab"]["<eot>"] = values["model"]["vocab"].pop("</s>")


def add_token(values: dict[str, Any]) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"].append({"id": 300, "content": "<pad>", "special": True, **flags})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (swap_tokens, r"token \d+ is '[ab]' and '[ab]'"),
        (swap_merges, "merge 0 is"),
        (drop_merge, r"merge \d+ is .* and absent"),
        (rename_special, "added token 1 is '</s>' and '<eot>'"),
        (add_token, "300 and 301 ids; added token 300 is absent and '<pad>'"),
    ],
)
def test_a_difference_that_matters_is_named_with_both_models(
    tmp_path: Path, byte_level: TextTokenizer, change: Change, part: str
) -> None:
    other = variant(tmp_path, change)
    assert other.digest != byte_level.digest
    with pytest.raises(ConfigError, match=part) as caught:
        check_same_tokenizer([("draft", byte_level), ("target", other)])
    assert "draft and target have different tokenizers" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_draft_is_compared_with_the_target(byte_level: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"middle and target have .*one is bytes, the other BPE"):
        check_same_tokenizer(
            [("draft", byte_level), ("middle", ByteTokenizer()), ("target", byte_level)]
        )
    check_same_tokenizer([("alone", byte_level)])
    check_same_tokenizer([("one", ByteTokenizer()), ("two", ByteTokenizer())])


def test_unigram_scores_matter(tmp_path: Path) -> None:
    def unigram(score: float) -> TextTokenizer:
        backend = Backend(models.Unigram([("<unk>", 0.0), ("a", score)], unk_id=0))
        return load_tokenizer(save(tmp_path / str(score), backend.to_str()))

    check_same_tokenizer([("one", unigram(-1.0)), ("two", unigram(-1.0))])
    with pytest.raises(ConfigError, match=r"the score of token 1 is -1.0 and -2.0"):
        check_same_tokenizer([("one", unigram(-1.0)), ("two", unigram(-2.0))])


# Streaming


def streamed(tokenizer: TextTokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    """The pieces when `ids` come in batches of these sizes, then of one."""
    decoder, pieces, position = StreamDecoder(tokenizer), [], 0
    while position < len(ids):
        size = sizes.pop() if sizes else 1
        pieces.append(decoder.push(ids[position : position + size]))
        position += size
    return [*pieces, decoder.flush()]


BATCHES = st.lists(st.integers(1, 5), max_size=20)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 255), max_size=40), sizes=BATCHES, kind=st.integers(0, 2))
def test_streamed_text_equals_decoded_text_for_any_ids(
    byte_level: TextTokenizer,
    sentencepiece: TextTokenizer,
    ids: list[int],
    sizes: list[int],
    kind: int,
) -> None:
    tokenizer = (byte_level, sentencepiece, ByteTokenizer())[kind]
    offset = max(0, tokenizer.num_ids - 256) if kind == 1 else 0
    ids = [index if index < 3 else index + offset for index in ids]
    assert "".join(streamed(tokenizer, ids, sizes)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(alphabet="ab \n the fox é你😀\u200d", max_size=30), sizes=BATCHES)
def test_streaming_never_shows_half_a_character(
    byte_level: TextTokenizer, sentencepiece: TextTokenizer, text: str, sizes: list[int]
) -> None:
    for tokenizer in (byte_level, sentencepiece, ByteTokenizer()):
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids, list(sizes))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_appears_as_soon_as_it_is_certain(byte_level: TextTokenizer) -> None:
    decoder = StreamDecoder(byte_level)
    face = byte_level.encode("😀")
    assert len(face) > 1, "a character of several tokens"
    assert decoder.push(byte_level.encode("fox")) == "fox"
    assert [decoder.push([index]) for index in face[:-1]] == [""] * (len(face) - 1)
    assert decoder.push(face[-1:]) == "😀"
    assert decoder.push([*byte_level.encode("ok"), *face[:1]]) == "ok"
    assert decoder.flush() == "\ufffd"


def test_spaces_between_words_survive_special_tokens(sentencepiece: TextTokenizer) -> None:
    the, fox, end = (sentencepiece.encode("the")[-1], sentencepiece.encode("fox")[-1], 2)
    ids = [end, the, end, end, fox, end, the]
    assert "".join(streamed(sentencepiece, ids, [])) == sentencepiece.decode(ids)


def test_a_decoder_is_as_new_after_a_flush(byte_level: TextTokenizer) -> None:
    decoder = StreamDecoder(byte_level)
    for _ in range(2):
        assert decoder.push(byte_level.encode("the fox")) + decoder.flush() == "the fox"


def test_the_window_stays_short(byte_level: TextTokenizer) -> None:
    """A long output costs the same for each token."""
    rng, decoder = random.Random(0), StreamDecoder(byte_level)
    longest = 0
    for _ in range(2000):
        decoder.push([rng.randrange(byte_level.num_ids)])
        longest = max(longest, len(decoder._window))
    assert longest < 60


def test_the_lengths_of_tokens_divide_the_text(
    byte_level: TextTokenizer, sentencepiece: TextTokenizer
) -> None:
    for tokenizer in (byte_level, sentencepiece, ByteTokenizer()):
        ids = [*tokenizer.encode("the fox 😀 a"), max(tokenizer.special_ids)]
        text = tokenizer.decode(ids)
        lengths = token_lengths(tokenizer, ids, text)
        assert len(lengths) == len(ids)
        assert (sum(lengths), lengths[-1]) == (len(text), 0)
        before_stop = token_lengths(tokenizer, ids, text[:5])
        assert sum(before_stop) == 5
        assert all(cut <= whole for cut, whole in zip(before_stop, lengths))
    face = byte_level.encode("😀")
    assert token_lengths(byte_level, face, "😀") == [0] * (len(face) - 1) + [1]
    assert token_lengths(byte_level, face[:1], "\ufffd") == [1]
    assert token_lengths(byte_level, [], "") == []
