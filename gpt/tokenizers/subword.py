"""Subword tokenizers that are trained with the Hugging Face library `tokenizers`: byte-level BPE and WordPiece.

The library is imported only to train and to encode; decoding does not need it.
"""

import json
import re
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from gpt.tokenizers.base import MIN_FREQUENCY, Kind, Tokenizer, Tokens, check_vocab_size

if TYPE_CHECKING:
    import tokenizers

# GPT-2's pre-tokenization (Radford et al. 2019) with bounded length: learning and encoding take quadratic time in it.
CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
PATTERN = r" ?\p{L}{1,64}| ?\p{N}{1,64}| ?[^\s\p{L}\p{N}]{1,64}|\s{1,64}(?!\S)|\s{1,64}"
MAX_PRE_TOKEN = 65  # characters that the pattern matches at most

# Pieces of a text that can be encoded independently: words and punctuation in ASCII, white space, anything else up
# to white space. Python's `re` has no \p{L}, so a piece ends only where a pre-token does, whatever is beyond ASCII.
SPACE, OTHER = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"  # \s and \S in the pattern
PIECES = re.compile(
    r" ?[A-Za-z]{1,64}+(?![^\x00-\x7f])"
    rf"| ?[!-&(-/:-@\[-`{{-~]++(?=[A-Za-z0-9]|{SPACE})"  # without ', which may begin a contraction
    rf"|{SPACE}+(?!{OTHER})|[^\S \x1c-\x1f]| ?{OTHER}+"
)
MAX_KNOWN = 1 << 21  # characters of the pieces whose tokens are remembered

BYTES = 256


def _byte_characters() -> dict[int, str]:
    """GPT-2's mapping of bytes to characters: printable Latin-1 to itself, all others to U+0100 and above."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(BYTES) if byte not in printable]
    return {byte: chr(byte if byte in printable else BYTES + others.index(byte)) for byte in range(BYTES)}


BYTE_TO_CHARACTER = _byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def bytes_to_text(token: bytes) -> str:
    """Write bytes as printable characters, as GPT-2's vocabulary files do."""
    return "".join(BYTE_TO_CHARACTER[byte] for byte in token)


def text_to_bytes(token: str) -> bytes:
    """The inverse of `bytes_to_text`."""
    return bytes(CHARACTER_TO_BYTE[character] for character in token)


@dataclass(frozen=True)
class SubwordTokenizer(Tokenizer):
    """A tokenizer of the library."""

    @property
    @abstractmethod
    def _engine(self) -> "tokenizers.Tokenizer":
        """The library's object."""

    def _encode(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[Tokens]:
        """Encode the chunks of a long text, each by itself; the results are those of `encode`.

        The library encodes each distinct piece once: most pieces of a natural text are repetitions.
        """
        known, size = dict[str, bytes](), 0
        for chunk in chunks:
            self._check(chunk)
            pieces = PIECES.findall(chunk)
            new = [piece for piece in dict.fromkeys(pieces) if piece not in known]
            encodings = self._engine.encode_batch_fast(new, add_special_tokens=False)
            known |= {piece: np.array(one.ids, np.uint32).tobytes() for piece, one in zip(new, encodings, strict=True)}
            yield np.frombuffer(b"".join(map(known.__getitem__, pieces)), np.uint32)
            size += sum(map(len, new))
            if size > MAX_KNOWN:
                known, size = {}, 0


@dataclass(frozen=True)
class BpeTokenizer(SubwordTokenizer):
    """Byte-level byte pair encoding (Sennrich et al. 2016): the most frequent pair of tokens is merged, repeatedly.

    The 256 bytes have the first IDs; merged tokens follow in the order of the merges. Any text can be encoded.

    Args:
        merges: left and right token of each merge, separated by a space; bytes as in `bytes_to_text` (a space is `Ġ`).
    """

    merges: tuple[str, ...]

    kind: ClassVar[Kind] = "bpe"
    expected: ClassVar[str] = "a list of distinct merges of bytes and earlier merges"

    @classmethod
    def train(cls, chunks: Iterable[str], vocab_size: int) -> Self:
        """Learn the merges from a text that is given in chunks.

        Raises:
            UserError: `vocab_size` is smaller than the number of bytes.
        """
        from tokenizers import models, trainers  # noqa: PLC0415

        check_vocab_size(vocab_size, BYTES, "one token for each byte")
        engine = _make_engine(models.BPE())
        alphabet = list(CHARACTER_TO_BYTE)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=MIN_FREQUENCY,
            initial_alphabet=alphabet,
            show_progress=sys.stderr.isatty(),
        )
        engine.train_from_iterator(chunks, trainer)
        return cls(tuple(" ".join(pair) for pair in json.loads(engine.to_str())["model"]["merges"]))

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each token."""
        return tuple(map(text_to_bytes, self._ids))

    def _is_valid(self) -> bool:
        known = set(CHARACTER_TO_BYTE)
        for left, _, right in (merge.partition(" ") for merge in self.merges):
            if not {left, right} <= known:
                return False
            known.add(left + right)
        return True

    @cached_property
    def _ids(self) -> dict[str, int]:
        """Token IDs by token. Two different merges may produce the same token, which has one ID."""
        tokens = dict.fromkeys([*CHARACTER_TO_BYTE, *(merge.replace(" ", "") for merge in self.merges)])
        return {token: number for number, token in enumerate(tokens)}

    @cached_property
    def _engine(self) -> "tokenizers.Tokenizer":
        from tokenizers import models  # noqa: PLC0415

        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in self.merges)]
        return _make_engine(models.BPE(vocab=self._ids, merges=pairs))


@dataclass(frozen=True)
class WordPieceTokenizer(SubwordTokenizer):
    """WordPiece as in BERT (Devlin et al. 2019): a word starts with its longest known prefix, then continues likewise.

    Unlike BERT's, the encoding is lossless: spaces belong to the words, and every character of the training text is
    both a beginning and a continuation, so that no word is unknown. The beginnings have the first IDs.
    """

    beginnings: tuple[str, ...]
    continuations: tuple[str, ...]

    kind: ClassVar[Kind] = "wordpiece"
    expected: ClassVar[str] = "distinct beginnings and continuations, every character as both"

    @classmethod
    def train(cls, chunks: Iterable[str], alphabet: str, vocab_size: int) -> Self:
        """Learn beginnings and continuations from a text that is given in chunks.

        Raises:
            UserError: `vocab_size` is smaller than twice the alphabet.
        """
        from tokenizers import models, trainers  # noqa: PLC0415

        check_vocab_size(vocab_size, 2 * len(alphabet), "two tokens for each character of the training text")
        prefix = _continuation_prefix(alphabet)
        engine = _make_engine(models.WordPiece(vocab={}, unk_token=prefix))
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=MIN_FREQUENCY,
            initial_alphabet=list(alphabet),
            # As special tokens, for a fixed order: otherwise their IDs, which break ties, differ from run to run.
            special_tokens=[prefix + character for character in alphabet],
            continuing_subword_prefix=prefix,
            show_progress=sys.stderr.isatty(),
        )
        engine.train_from_iterator(chunks, trainer)
        ids = engine.get_vocab()
        tokens = sorted(ids, key=ids.__getitem__)
        beginnings = tuple(token for token in tokens if not token.startswith(prefix))
        return cls(beginnings, tuple(token[1:] for token in tokens if token.startswith(prefix)))

    @cached_property
    def alphabet(self) -> str:
        """The beginnings of one character."""
        return "".join(sorted(token for token in self.beginnings if len(token) == 1))

    def _is_valid(self) -> bool:
        characters = set("".join([*self.beginnings, *self.continuations]))
        return bool(characters) and characters <= set(self.beginnings) & set(self.continuations)

    @cached_property
    def _engine(self) -> "tokenizers.Tokenizer":
        from tokenizers import models  # noqa: PLC0415

        prefix = _continuation_prefix(self.alphabet)
        tokens = [*self.beginnings, *(prefix + token for token in self.continuations)]
        model = models.WordPiece(
            vocab={token: number for number, token in enumerate(tokens)},
            unk_token=prefix,  # not in the vocabulary: an unknown word would raise an error
            max_input_chars_per_word=MAX_PRE_TOKEN,
            continuing_subword_prefix=prefix,
        )
        return _make_engine(model)


def _continuation_prefix(alphabet: str) -> str:
    """A character outside the alphabet that marks continuations; BERT's `##` could be part of the text."""
    return next(character for character in map(chr, range(0xE000, 0x110000)) if character not in alphabet)


def _make_engine(model: "tokenizers.models.Model") -> "tokenizers.Tokenizer":
    """The library's tokenizer, with the pre-tokenization of the model."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    engine = Tokenizer(model)
    if isinstance(model, models.BPE):
        split = pre_tokenizers.Split(Regex(f"{CONTRACTIONS}|{PATTERN}"), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        engine.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    else:
        engine.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    return engine
