import json
from pathlib import Path

import pytest

from scgpt.errors import ConfigError, DataError
from scgpt.vocab import PUBLISHED, GeneVocab


def test_the_published_vocabulary_has_its_known_ids():
    vocab = GeneVocab.named(PUBLISHED)
    assert len(vocab) == 60_697
    assert [vocab[token] for token in ("A1BG", "<pad>", "<cls>", "<eoc>")] == [0, 60_694, 60_695, 60_696]
    assert vocab.get_itos()[vocab["CD3D"]] == "CD3D"
    with pytest.raises(KeyError):
        vocab["no such gene"]


def test_it_survives_its_file(tmp_path: Path):
    vocab = GeneVocab.from_dict({"<pad>": 0, "<cls>": 1, "B": 2, "A": 3, "é": 4})
    vocab.save_json(tmp_path / "vocab.json")
    again = GeneVocab.from_file(tmp_path / "vocab.json")
    assert again.get_stoi() == vocab.get_stoi() == {"<pad>": 0, "<cls>": 1, "B": 2, "A": 3, "é": 4}
    assert again.sha256 == vocab.sha256
    assert json.loads((tmp_path / "vocab.json").read_text())["é"] == 4


def test_upstreams_ways_of_asking_work():
    vocab = GeneVocab(["a", "b"], specials=["<pad>"], special_first=False)
    assert vocab(["b", "a", "unknown"]) == [1, 0, 2]          # the default token answers for the unknown
    assert "unknown" not in vocab
    assert vocab.get("unknown") is None
    vocab.append_token("c")
    assert vocab["c"] == 3
    vocab.set_default_index(0)
    assert vocab["unknown"] == 0
    assert GeneVocab(vocab).lookup_tokens([3, 0]) == ["c", "a"]
    assert dict(vocab) == {"a": 0, "b": 1, "<pad>": 2, "c": 3}
    vocab.insert_token("d", 1)
    assert vocab.get_stoi() == {"a": 0, "d": 1, "b": 2, "<pad>": 3, "c": 4}
    assert vocab.pad_token is None
    vocab.pad_token = "<pad>"
    assert vocab.pad_token == "<pad>"


@pytest.mark.parametrize(("content", "says"), [
    ('{"a": 0, "b": 2}', "not 0 to 1"), ('{"a": 0, "b": 0}', "not 0 to 1"), ("[]", "not a vocabulary"),
    ('{"a": "0"}', "not a vocabulary"), ("{", "not JSON"),
])
def test_a_file_that_is_no_vocabulary_is_refused_by_name(tmp_path: Path, content: str, says: str):
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        GeneVocab.from_file(tmp_path / "vocab.json")
    assert "vocab.json" in str(caught.value)


def test_a_missing_file_is_a_wrong_setting(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        GeneVocab.named(str(tmp_path / "vocab.json"))


@pytest.mark.parametrize(("special_first", "tokens"), [
    (True, ["<pad>", "c", "a", "d", "b"]), (False, ["a", "d", "b", "<pad>", "c"])])
def test_a_list_is_numbered_by_frequency_then_by_name_as_upstream(special_first: bool, tokens: list[str]):
    genes = ["d", "c", "b", "a", "d", "a", "c", "c"]
    assert GeneVocab(genes, specials=["<pad>", "c"], special_first=special_first).get_itos() == tokens


@pytest.mark.parametrize(("index", "token", "says"), [(0, "a", "already"), (4, "n", "gap"), (-1, "n", "gap")])
def test_a_token_that_cannot_be_added_is_refused(index: int, token: str, says: str):
    vocab = GeneVocab(["a", "b"], specials=["<pad>"])
    with pytest.raises(DataError, match=says):
        vocab.insert_token(token, index)
    assert vocab.get_itos() == ["<pad>", "a", "b"]


def test_what_is_not_in_the_vocabulary_is_no_default_and_no_padding():
    vocab = GeneVocab(["a"])
    with pytest.raises(ValueError, match="'b' is not"):
        vocab.set_default_token("b")
    with pytest.raises(ValueError, match="'b' is not"):
        vocab.pad_token = "b"
    with pytest.raises(ValueError, match="list of genes"):
        GeneVocab(vocab, specials=["<pad>"])
