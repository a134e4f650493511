"""The tokenizers whose tokens are parts of words: learned ones (Hugging Face `tokenizers`), and GPT-2's (`tiktoken`).

The libraries are imported when a text is learned or encoded, so that whoever only decodes does without.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

from gpt.tokenizers.base import Kind, Tokenizer, check_vocab_size, invalid_tokenizer, is_token_list

if TYPE_CHECKING:
    import tokenizers

# The same in bounded parts: WordPiece tries every length at every place, which takes the square of a part's length.
SHORT_PARTS = r" ?\p{L}{1,64}| ?\p{N}{1,64}| ?[^\s\p{L}\p{N}]{1,64}|\s{1,64}(?!\S)|\s{1,64}"

LONGEST_PART = 65

LEAST_OCCURRENCES = 2  # of a pair that becomes a token: what occurs once teaches nothing

BYTES = 256


def _byte_characters() -> dict[int, str]:
    """GPT-2's way to write bytes as text: printable ones of Latin-1 as they are, the others from U+0100 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(BYTES) if byte not in plain]
    return {byte: chr(byte if byte in plain else BYTES + others.index(byte)) for byte in range(BYTES)}


BYTE_TO_CHARACTER = _byte_characters()

CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def bytes_to_text(token: bytes) -> str:
    """Write bytes as visible characters, as GPT-2's vocabulary files do."""
    return "".join(BYTE_TO_CHARACTER[byte] for byte in token)


def text_to_bytes(token: str) -> bytes:
    """The reverse of `bytes_to_text`."""
    return bytes(CHARACTER_TO_BYTE[character] for character in token)


@dataclass(frozen=True)
class BpeTokenizer(Tokenizer):
    """Byte pair encoding (Sennrich et al. 2016) on bytes: what stands side by side most often becomes one token.

    The numbers of the 256 bytes come first, then what the merges make, in the order in which they were learned. Any
    text can be encoded.

    Args:
        merges: left and right part of each merge, bytes written as GPT-2 does (a space is `Ġ`), a space between them.
    """

    merges: tuple[str, ...]

    kind: ClassVar[Kind] = "bpe"

    @classmethod
    def train(cls, pieces: Iterable[str], vocab_size: int) -> Self:
        """Learn the merges from a text that comes in pieces.

        Raises:
            UserError: not even the bytes fit.
        """
        from tokenizers import Tokenizer as Engine  # noqa: PLC0415 (only who uses this kind waits for it)
        from tokenizers import models, pre_tokenizers, trainers  # noqa: PLC0415

        check_vocab_size(vocab_size, BYTES, "each byte has a token")
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=LEAST_OCCURRENCES,
            initial_alphabet=list(BYTE_TO_CHARACTER.values()),
            show_progress=False,
        )
        engine.train_from_iterator(pieces, trainer)
        return cls(tuple(" ".join(pair) for pair in json.loads(engine.to_str())["model"]["merges"]))

    @property
    def alphabet(self) -> None:
        """Any text can be encoded."""

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each token."""
        return tuple(map(text_to_bytes, self._numbers))

    def _encode(self, text: str) -> list[int]:
        """What Hugging Face's encoder gives."""
        return self._engine.encode(text, add_special_tokens=False).ids

    def to_json(self) -> dict[str, Any]:
        """The merges in order."""
        return {"kind": self.kind, "merges": list(self.merges)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Check that every merge is of two tokens that were there before it."""
        merges, known = value.get("merges"), set(BYTE_TO_CHARACTER.values())
        if not is_token_list(merges):
            raise invalid_tokenizer(cls.kind, "a list of distinct merges")
        for merge in value["merges"]:
            left, _, right = merge.partition(" ")
            if not {left, right} <= known:
                raise invalid_tokenizer(cls.kind, "merges of tokens that are there before")
            known.add(left + right)
        return cls(tuple(value["merges"]))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The number of each token; two merges may make the same one."""
        tokens = dict.fromkeys([*BYTE_TO_CHARACTER.values(), *(merge.replace(" ", "") for merge in self.merges)])
        return {token: number for number, token in enumerate(tokens)}

    @cached_property
    def _engine(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer as Engine  # noqa: PLC0415
        from tokenizers import models, pre_tokenizers  # noqa: PLC0415

        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in self.merges)]
        engine = Engine(models.BPE(vocab=self._numbers, merges=pairs))
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return engine


@dataclass(frozen=True)
class WordPieceTokenizer(Tokenizer):
    """WordPiece as in BERT (Devlin et al. 2019): the longest known beginning of a part, then the longest continuation.

    Unlike there, nothing of the text is lost: spaces belong to the parts, and each character of the training text is
    known as a beginning and as a continuation, so that no part is unknown. The numbers of the beginnings come first.
    """

    beginnings: tuple[str, ...]
    continuations: tuple[str, ...]

    kind: ClassVar[Kind] = "wordpiece"

    @classmethod
    def train(cls, pieces: Iterable[str], alphabet: str, vocab_size: int) -> Self:
        """Learn beginnings and continuations from a text that comes in pieces.

        Raises:
            UserError: not even the characters fit.
        """
        from tokenizers import Tokenizer as Engine  # noqa: PLC0415
        from tokenizers import models, trainers  # noqa: PLC0415

        least = 2 * len(alphabet)
        check_vocab_size(vocab_size, least, "each character of the training text begins and continues words")
        mark = _mark(alphabet)
        engine = Engine(models.WordPiece(vocab={}, unk_token=mark))
        engine.pre_tokenizer = _short_parts()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=LEAST_OCCURRENCES,
            initial_alphabet=list(alphabet),
            special_tokens=[mark + character for character in alphabet],  # else numbered by chance, which decides ties
            continuing_subword_prefix=mark,
            show_progress=False,
        )
        engine.train_from_iterator(pieces, trainer)
        tokens = sorted(engine.get_vocab(), key=engine.get_vocab().__getitem__)
        beginnings = tuple(token for token in tokens if not token.startswith(mark))
        return cls(beginnings, tuple(token[1:] for token in tokens if token.startswith(mark)))

    @cached_property
    def alphabet(self) -> str:
        """The characters that begin words."""
        return "".join(sorted(token for token in self.beginnings if len(token) == 1))

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """Beginnings and continuations, each in UTF-8."""
        return tuple(token.encode() for token in (*self.beginnings, *self.continuations))

    def _encode(self, text: str) -> list[int]:
        """What Hugging Face's encoder gives."""
        return self._engine.encode(text, add_special_tokens=False).ids

    def to_json(self) -> dict[str, Any]:
        """Both lists."""
        return {"kind": self.kind, "beginnings": list(self.beginnings), "continuations": list(self.continuations)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Check that both lists hold every character that occurs in one of them."""
        lists = value.get("beginnings"), value.get("continuations")
        if not (value.get("beginnings") and all(is_token_list(each) for each in lists)):
            raise invalid_tokenizer(cls.kind, "distinct beginnings and distinct continuations")
        made = cls(tuple(value["beginnings"]), tuple(value["continuations"]))
        characters = set("".join([*made.beginnings, *made.continuations]))
        if not characters <= set(made.beginnings) & set(made.continuations):
            raise invalid_tokenizer(cls.kind, "every character as a beginning and as a continuation")
        return made

    @cached_property
    def _engine(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer as Engine  # noqa: PLC0415
        from tokenizers import models  # noqa: PLC0415

        mark = _mark(self.alphabet)
        tokens = [*self.beginnings, *(mark + token for token in self.continuations)]
        model = models.WordPiece(
            vocab={token: number for number, token in enumerate(tokens)},
            unk_token=mark,  # not in the vocabulary: the encoder would raise rather than lose a character
            max_input_chars_per_word=LONGEST_PART,
            continuing_subword_prefix=mark,
        )
        engine = Engine(model)
        engine.pre_tokenizer = _short_parts()
        return engine


def _mark(alphabet: str) -> str:
    """A character that no text over the alphabet holds, to tell continuations from beginnings."""
    return next(mark for mark in map(chr, range(0xE000, 0x110000)) if mark not in alphabet)


def _short_parts() -> "tokenizers.pre_tokenizers.PreTokenizer":
    from tokenizers import Regex, pre_tokenizers  # noqa: PLC0415

    return pre_tokenizers.Split(Regex(SHORT_PARTS), "isolated")
