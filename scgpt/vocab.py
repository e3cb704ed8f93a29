"""GeneVocab: gene and special token <-> id, as `vocab.json` of every scGPT release holds them.

Behaves as upstream's class of that name (a torchtext vocabulary) without torchtext: `vocab["CD3D"]`, `"CD3D" in vocab`,
`vocab(["CD3D", "CD8A"])`, `get_stoi()`, `get_itos()`, `set_default_index(i)`, `append_token(t)`.
"""
from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files as package_files
from json.encoder import encode_basestring
from pathlib import Path

from scgpt.errors import ConfigError, DataError
from scgpt.files import write_bytes

PAD, CLS, EOC = "<pad>", "<cls>", "<eoc>"
SPECIAL_TOKENS = (PAD, CLS, EOC)
PUBLISHED = "scgpt-human"   # the vocabulary of the published checkpoints: 60,694 genes, then the three special tokens
GENCODE_MOUSE = "gencode-mouse"   # the symbols of GENCODE vM37, sorted, then the three; genes without one are left out


class GeneVocab(Mapping[str, int]):
    """An ordered set of tokens; the id of a token is its place.

    Args:
        gene_list_or_vocab: genes in any order, ids go by frequency in the list, then by name, as upstream's do; or
            another vocabulary to copy. `from_dict` keeps ids that are known.
        specials: special tokens, in the order of their ids.
        special_first: put `specials` before the genes (upstream's default) or after them.
        default_token: its id is returned for unknown tokens when it is present; None: unknown tokens raise KeyError.

    Raises ValueError when `specials` come with a vocabulary.
    """

    def __init__(self, gene_list_or_vocab: Sequence[str] | GeneVocab, specials: Sequence[str] | None = None,
                 special_first: bool = True, default_token: str | None = PAD) -> None:  # noqa: FBT001, FBT002 upstream
        if isinstance(gene_list_or_vocab, GeneVocab):
            if specials is not None:
                raise ValueError("specials can be given with a list of genes only, not with a vocabulary")
            tokens = gene_list_or_vocab.get_itos()
        else:
            tokens = _in_order(gene_list_or_vocab, specials or (), special_first=special_first)
        self._pad_token: str | None = None
        self._number(tokens, default_token)

    def _number(self, tokens: list[str], default_token: str | None) -> None:
        self._tokens, self._ids = tokens, {token: index for index, token in enumerate(tokens)}
        self._default_index = None if default_token is None else self._ids.get(default_token)

    @classmethod
    def from_dict(cls, token2idx: Mapping[str, int], default_token: str | None = PAD) -> GeneVocab:
        """From token -> id; the ids must be 0 .. n - 1, each once (else DataError)."""
        tokens = sorted(token2idx, key=lambda token: token2idx[token])
        if [token2idx[token] for token in tokens] != list(range(len(tokens))):
            raise DataError(f"the ids of {len(tokens)} tokens are not 0 to {len(tokens) - 1}, each once",
                            fix="number the tokens without gaps")
        vocab = cls([])
        vocab._number(tokens, default_token)
        return vocab

    @classmethod
    def from_file(cls, file_path: Path | str, default_token: str | None = PAD) -> GeneVocab:
        """Read a `vocab.json` (token -> id)."""
        path = Path(file_path)
        try:
            token2idx = json.loads(path.read_bytes())
            if not isinstance(token2idx, dict) or not all(type(i) is int for i in token2idx.values()):
                raise DataError("not a vocabulary: it must be a JSON object of token -> id", where=str(path),
                                fix="give a vocab.json as scGPT releases hold it")
            return cls.from_dict(token2idx, default_token)
        except OSError as error:
            raise ConfigError(f"the vocabulary cannot be read: {error.strerror}", where=str(path),
                              fix=f"give the path of a vocab.json, or a name: {PUBLISHED}, {GENCODE_MOUSE}") from error
        except ValueError as error:
            raise DataError(f"not JSON: {error}", where=str(path), fix="give a vocab.json") from error
        except DataError as error:
            raise DataError(error.what, where=str(path), fix=error.fix) from error

    @classmethod
    def named(cls, name: str) -> GeneVocab:
        """The vocabulary that ships under this name, or the one in the file of that path; unknown tokens raise."""
        tables = package_files("scgpt.tables")
        if name == PUBLISHED:
            return cls.from_dict(json.loads((tables / "scgpt_vocab.json").read_bytes()), default_token=None)
        if name == GENCODE_MOUSE:
            lines = gzip.decompress((tables / "gencode_vM37_mouse.csv.gz").read_bytes()).decode().splitlines()
            symbols = {row[1] for row in csv.reader(lines) if row[1] != row[0]}
            return cls(sorted(symbols), SPECIAL_TOKENS, special_first=False, default_token=None)
        return cls.from_file(name, default_token=None)

    def __getitem__(self, token: str) -> int:
        index = self._ids.get(token, self._default_index)
        if index is None:
            raise KeyError(token)
        return index

    def get(self, token: str, default: int | None = None) -> int | None:  # type: ignore[override]
        """The id of a token that is there, else `default` (never the default index)."""
        return self._ids.get(token, default)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    def __call__(self, tokens: Sequence[str]) -> list[int]:
        """Ids of many tokens."""
        return [self[token] for token in tokens]

    lookup_indices = __call__

    def lookup_token(self, index: int) -> str:
        """The token with this id; IndexError when there is none."""
        return self._tokens[index]

    def lookup_tokens(self, indices: Sequence[int]) -> list[str]:
        """Tokens of many ids."""
        return [self._tokens[index] for index in indices]

    def get_stoi(self) -> dict[str, int]:
        """A copy of token -> id."""
        return dict(self._ids)

    def get_itos(self) -> list[str]:
        """A copy of the tokens in the order of their ids."""
        return list(self._tokens)

    def append_token(self, token: str) -> None:
        """Add a token with the next free id; DataError when it is there already."""
        self.insert_token(token, len(self._tokens))

    def insert_token(self, token: str, index: int) -> None:
        """Add a token at this id and move those behind it; DataError when it is there already, or would leave a gap."""
        if token in self._ids:
            raise DataError(f"token '{token}' is already in the vocabulary", fix="add each token once")
        if not 0 <= index <= len(self._tokens):
            raise DataError(f"id {index} would leave a gap: the vocabulary has {len(self._tokens)} tokens",
                            fix="give the next free id, or one that is taken")
        self._tokens.insert(index, token)
        for place in range(index, len(self._tokens)):
            self._ids[self._tokens[place]] = place

    def set_default_index(self, index: int | None) -> None:
        """What unknown tokens map to; None makes them raise KeyError."""
        self._default_index = index

    def get_default_index(self) -> int | None:
        """What unknown tokens map to."""
        return self._default_index

    def set_default_token(self, default_token: str) -> None:
        """Unknown tokens map to the id of `default_token` (ValueError when it is not in the vocabulary)."""
        self._default_index = self._ids[self._known(default_token)]

    def _known(self, token: str) -> str:
        if token not in self._ids:
            raise ValueError(f"token '{token}' is not in the vocabulary")
        return token

    @property
    def pad_token(self) -> str | None:
        """The padding token that was set; None before. Setting one that is not in the vocabulary is a ValueError."""
        return self._pad_token

    @pad_token.setter
    def pad_token(self, pad_token: str) -> None:
        self._pad_token = self._known(pad_token)

    def to_bytes(self) -> bytes:
        """The content of `vocab.json`: token -> id in the order of the ids."""
        rows = ",\n".join(f"  {encode_basestring(token)}: {index}" for token, index in self._ids.items())
        return (f"{{\n{rows}\n}}\n" if rows else "{}\n").encode()   # json.dumps(indent=2), ten times faster

    def save_json(self, file_path: Path | str) -> None:
        """Publish `vocab.json`."""
        write_bytes(Path(file_path), self.to_bytes())

    @property
    def sha256(self) -> str:
        """Digest of `to_bytes()`: the identity of the vocabulary."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def _in_order(genes: Sequence[str], specials: Sequence[str], *, special_first: bool) -> list[str]:
    """The most frequent gene first, equals by name; the special tokens, each once, before or after them."""
    times = Counter(genes)
    named = sorted(times.keys() - set(specials), key=lambda gene: (-times[gene], gene))
    return [*dict.fromkeys(specials), *named] if special_first else [*named, *dict.fromkeys(specials)]
