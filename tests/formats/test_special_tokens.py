"""Added tokens, and which of them are bos, eos and pad: as transformers has it."""
import json

import pytest
from small_tokenizers import (gpt2_pair, qwen_pair, save_trained, sentencepiece_pair, trained_json,
                              write_json)
from transformers import AutoTokenizer

from formats.tokenizer import load_tokenizer
from support.errors import UserError


def roles_of(tokenizer) -> tuple:
    return tokenizer.bos, tokenizer.eos, tokenizer.pad


def roles_in_transformers(tokenizer) -> tuple:
    return tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id


def test_bos_eos_and_pad_are_those_of_transformers():
    for mine, reference in (gpt2_pair(), qwen_pair()):
        assert roles_of(mine) == roles_in_transformers(reference)


@pytest.mark.parametrize("config, mapped", [
    ({"bos_token": "<tool>>", "eos_token": {"__type": "AddedToken", "content": "<tool>"}}, None),
    ({"bos_token": "<tool>>", "pad_token": None}, {"bos_token": "<tool>", "pad_token": "<tool>>"}),
    ({"bos_token": "<|im_start|>", "added_tokens_decoder": {}}, {"bos_token": "<tool>"}),
    ({"eos_token": "<tool>"}, {"pad_token": {"content": "<|im_start|>", "lstrip": False}}),
])
def test_the_files_that_name_special_tokens_count_in_transformers_order(tmp_path, config, mapped):
    save_trained("llama3", tmp_path)
    write_json(tmp_path, tokenizer_config=config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    if mapped:
        write_json(tmp_path, special_tokens_map=mapped)
    mine, reference = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert roles_of(mine) == roles_in_transformers(reference)


def test_ids_in_config_json_count_where_no_token_is_named(tmp_path):
    save_trained("llama3", tmp_path)
    write_json(tmp_path, config={"bos_token_id": 5, "eos_token_id": [7, 8], "pad_token_id": None},
               generation_config={"bos_token_id": 6, "pad_token_id": 9})
    assert roles_of(load_tokenizer(tmp_path)) == (5, 7, 9)
    write_json(tmp_path, tokenizer_config={"bos_token": None}, config={"pad_token_id": -1})
    assert roles_of(load_tokenizer(tmp_path)) == (None, None, 9)


def test_special_tokens_can_be_left_out_of_the_text():
    text = "a <|endoftext|><tool>b <|im_start|>c"
    for mine, reference in (gpt2_pair(), qwen_pair()):
        ids = mine.encode(text)
        assert mine.decode(ids, special=False) == reference.decode(ids, skip_special_tokens=True)
    gpt2, qwen = (pair()[0].decode(pair()[0].encode(text), special=False)
                  for pair in (gpt2_pair, qwen_pair))
    assert (gpt2, qwen) == ("a <tool>b <|im_start|>c", "a b c")     # added_tokens.json, and marked


def test_a_token_that_has_a_role_is_special_whatever_a_file_says(tmp_path):
    spec = json.loads(trained_json("gpt2"))
    for token in spec["added_tokens"]:
        token["special"] = False
    write_json(tmp_path, tokenizer=spec, tokenizer_config={
        "eos_token": "<tool>", "tokenizer_class": "PreTrainedTokenizerFast"})
    mine, reference = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert mine.special == {mine.eos} == set(reference.all_special_ids)


def test_a_lone_surrogate_counts_as_the_replacement_character():
    for mine, _ in (gpt2_pair(), sentencepiece_pair()):
        assert mine.encode("a\ud83d") == mine.encode("a\ufffd")
        assert mine.encode("\ud83d\ude00") == mine.encode("😀")      # a pair written as two


@pytest.mark.parametrize("beyond", [-1, 10**6, 2**70])
def test_an_id_outside_the_vocabulary_is_a_user_error(beyond):
    for mine, _ in (gpt2_pair(), sentencepiece_pair()):
        with pytest.raises(UserError, match=f"{mine.path.name}: token id {beyond} "):
            mine.decode([0, beyond])
