"""What a token brings along from its neighbours before any attention: embeddings of n-grams."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLIER = 2_654_435_761  # near 2³² over the golden ratio, which scatters consecutive numbers (Knuth 1973, 6.4)

LIMIT = 1 << 62  # of a factor; with a large vocabulary only the last digits of an n-gram's number are kept


class NgramEmbeddings(nn.Module):
    """Vectors for the last 2, 3, … tokens, beside that of the token alone (Roy et al. 2022, N-Grammer).

    They cost a look-up and one product with a small matrix, and save the first layers from finding out which letters
    make a word. Where there are more n-grams than rows in a table, several share a row.
    """

    def __init__(self, longest: int, rows: int, narrow: int, vocab_size: int, width: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tables = nn.ModuleList(nn.Embedding(min(rows, vocab_size**n), narrow) for n in range(2, longest + 1))
        self.mix = nn.Linear(narrow * len(self.tables), width, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Look up the n-grams that end at each position, (B, T) to (B, T, C); before the first token stands token 0."""
        ngrams_BT, vectors = tokens_BT, []
        for n, table in enumerate(self.tables, start=2):
            assert isinstance(table, nn.Embedding)
            earlier_BT = F.pad(tokens_BT, (n - 1, 0))[:, : tokens_BT.shape[1]]
            ngrams_BT = ngrams_BT + pow(self.vocab_size, n - 1, LIMIT) * earlier_BT
            rows = table.num_embeddings
            vectors.append(table(ngrams_BT if rows == self.vocab_size**n else scattered(ngrams_BT, rows)))
        mixed_BTC: Tensor = self.mix(torch.cat(vectors, dim=-1))
        return mixed_BTC


def scattered(numbers: Tensor, rows: int) -> Tensor:
    """Give each number one of the rows, neighbouring numbers far apart."""
    return (numbers * MULTIPLIER >> 16) % rows
