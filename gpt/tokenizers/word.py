"""Word tokenizer: frequent words, and single characters for everything else."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Self

from gpt.tokenizers.base import MIN_FREQUENCY, Kind, Tokenizer, check_vocab_size

WORD = re.compile(r"\w+|\W")  # a word, or one other character: space, line feed, punctuation mark


@dataclass(frozen=True)
class WordTokenizer(Tokenizer):
    """Frequent words are tokens; all other words are split into their characters, which are tokens too.

    The characters have the first IDs, in sorted order. Words follow by descending frequency.
    """

    characters: str
    words: tuple[str, ...]

    kind: ClassVar[Kind] = "word"
    expected: ClassVar[str] = "characters in sorted order and distinct words that consist of them"

    @classmethod
    def train(cls, chunks: Iterable[str], alphabet: str, vocab_size: int) -> Self:
        """Select the most frequent words of a text that is given in chunks; equally frequent words are sorted.

        Raises:
            UserError: `vocab_size` is smaller than the alphabet.
        """
        check_vocab_size(vocab_size, len(alphabet), "one token for each character of the training text")
        frequencies = Counter(word for chunk in chunks for word in WORD.findall(chunk) if len(word) > 1)
        ranked = sorted((-frequency, word) for word, frequency in frequencies.items() if frequency >= MIN_FREQUENCY)
        return cls(alphabet, tuple(word for _, word in ranked[: vocab_size - len(alphabet)]))

    @property
    def alphabet(self) -> str:
        """The characters that are tokens."""
        return self.characters

    def _encode(self, text: str) -> list[int]:
        ids = {token: number for number, token in enumerate((*self.characters, *self.words))}
        return [ids[token] for word in WORD.findall(text) for token in ([word] if word in ids else word)]

    def _is_valid(self) -> bool:
        return set("".join(self.words)) <= set(self.characters) and not set(self.words) & set(self.characters)
