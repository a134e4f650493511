"""The promotion gate: whether a model is better than the champion beyond noise, and fit for use.

Two sources of noise are covered. The text: the interval of the difference comes from a bootstrap over the blocks of the
validation text (paired, as both models predict the same blocks). The seed: trainings that differ in nothing but
`train.seed` differ by more than that interval tells. So the interval has to lie beyond a margin, and a model whose
parameters are those of the champion with another seed is never promoted.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

MIN_IMPROVEMENT = 0.02  # bits per character: the smallest margin
SEEDS_NEEDED = 3  # trainings of one configuration, from which on their spread can enlarge the margin
DEVIATIONS = 1.64  # standard deviations of the difference of two such trainings: 95 % of differences are below
MAX_CALIBRATION_ERROR = 0.05  # expected calibration error
MAX_COPIED = 0.05  # share of the 30-character windows of generated text that occur in the training text
CONFIDENCE = 0.95
RESAMPLES, BOOTSTRAP_SEED = 10_000, 0
SEED = "train.seed"
HOLDS = {True: "yes", False: "**no**", None: ""}


@dataclass(frozen=True)
class Evaluation:
    """What the gate reads of an evaluated model.

    Attributes:
        checkpoint: SHA-256 that the training recorded.
        stored: SHA-256 of the checkpoint that the registry would serve; None: not checked.
        corpus: SHA-256 of the text.
        blocks: `plots/blocks.csv`.
        params: of its training, as `section.key` and text.
        bits_of_seeds: bits per character of trainings with these parameters and different seeds, itself included.
        rolled_back: when a user rolled this model back, else empty.
    """

    checkpoint: str
    corpus: str
    blocks: pd.DataFrame
    calibration_error: float
    copied: float
    params: Mapping[str, str] = field(default_factory=dict)
    bits_of_seeds: Sequence[float] = ()
    stored: str | None = None
    rolled_back: str = ""

    @property
    def bits(self) -> float:
        """The loss in bits per character."""
        return float(self.blocks["nats"].sum() / math.log(2) / self.blocks["characters"].sum())


@dataclass(frozen=True)
class Difference:
    """Candidate minus champion in bits per character, with the bounds of its interval; negative is better."""

    bits: float
    low: float
    high: float

    @property
    def interval(self) -> str:
        """The bounds as text."""
        return f"{self.low:+.4f} to {self.high:+.4f}"


@dataclass(frozen=True)
class Check:
    """One line of the report: the values of both models, what is required, and whether it holds (None: no matter)."""

    name: str
    candidate: str
    champion: str
    required: str
    holds: bool | None


@dataclass(frozen=True)
class Verdict:
    """The checks and what follows from them; `difference` is None without a comparable champion."""

    checks: Sequence[Check]
    difference: Difference | None
    reason: str

    @property
    def promoted(self) -> bool:
        """Whether the candidate becomes the champion."""
        return all(check.holds is not False for check in self.checks)

    @property
    def text(self) -> str:
        """The verdict with its reason in one line."""
        return f"{'promoted' if self.promoted else 'kept'}: {self.reason}"


def judge(candidate: Evaluation, champion: Evaluation | None) -> Verdict:
    """Compare a candidate with the champion; without a champion, the candidate only has to pass the guards."""
    checks = list(_guards(candidate, champion))
    comparable = champion is not None and _same_text(candidate, champion)
    difference = paired_difference(candidate.blocks, champion.blocks) if champion and comparable else None
    if champion and difference:
        checks = [*_improvement(candidate, champion, difference), *checks]
    failed = [check for check in checks if check.holds is False]
    if not failed:
        reason = f"better by {-difference.bits:.4f} bits per character" if difference else "the first champion"
    elif champion and not comparable:
        reason = "not comparable with the champion, which was evaluated on another text"
    else:
        reason = "; ".join(f"{check.name}: {check.candidate}, required: {check.required}" for check in failed)
    return Verdict(checks, difference, reason)


def paired_difference(candidate: pd.DataFrame, champion: pd.DataFrame) -> Difference:
    """The difference of two models on the same blocks, with the percentiles of a bootstrap over the blocks."""
    characters = candidate["characters"].to_numpy(float)
    bits = (candidate["nats"] - champion["nats"]).to_numpy(float) / math.log(2)
    drawn = np.random.default_rng(BOOTSTRAP_SEED).integers(len(bits), size=(RESAMPLES, len(bits)))
    resampled = bits[drawn].sum(1) / characters[drawn].sum(1)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(bits.sum() / characters.sum()), float(low), float(high))


def margin(models: Sequence[Evaluation]) -> float:
    """By how many bits per character a model has to be better: more than a change of the seed usually yields."""
    spreads = [statistics.stdev(m.bits_of_seeds) for m in models if len(m.bits_of_seeds) >= SEEDS_NEEDED]
    return max([MIN_IMPROVEMENT, *(DEVIATIONS * math.sqrt(2) * spread for spread in spreads)])


def without_seed(params: Mapping[str, str]) -> dict[str, str]:
    """The parameters that distinguish configurations: not the seed, nor where the text came from."""
    return {key: value for key, value in params.items() if key != SEED and not key.startswith("download.")}


def table(checks: Sequence[Check]) -> str:
    """The checks as a Markdown table with aligned columns."""
    rows = [["check", "candidate", "champion", "required", "holds"]]
    rows += [[c.name, c.candidate, c.champion, c.required, HOLDS[c.holds]] for c in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def _same_text(candidate: Evaluation, champion: Evaluation) -> bool:
    """Whether both were evaluated on the same characters."""
    same_blocks = candidate.blocks["characters"].equals(champion.blocks["characters"])
    return candidate.corpus == champion.corpus and same_blocks


def _improvement(candidate: Evaluation, champion: Evaluation, difference: Difference) -> Iterator[Check]:
    required = -margin([candidate, champion])
    source = " (spread of seeds)" if required < -MIN_IMPROVEMENT else ""
    yield Check("bits per character", f"{candidate.bits:.4f}", f"{champion.bits:.4f}", "", None)
    yield Check(
        f"difference ({CONFIDENCE:.0%} interval)",
        f"{difference.bits:+.4f} ({difference.interval})",
        "",
        f"all below {required:+.4f}{source}",
        difference.high < required,
    )


def _guards(candidate: Evaluation, champion: Evaluation | None) -> Iterator[Check]:
    """The checks that do not compare losses; a value that is not a number passes none."""
    if not champion:
        number = math.isfinite(candidate.bits)
        yield Check("bits per character", f"{candidate.bits:.4f}", "", "a number", number)

    def check(name: str, values: Sequence[str], required: str, *, holds: bool) -> Check:
        return Check(name, values[0], values[1] if champion else "", required, holds)

    models = [candidate, champion or candidate]
    errors, shares = [f"{m.calibration_error:.1%}" for m in models], [f"{m.copied:.1%}" for m in models]
    calibrated, original = candidate.calibration_error <= MAX_CALIBRATION_ERROR, candidate.copied <= MAX_COPIED
    yield check("calibration error", errors, f"at most {MAX_CALIBRATION_ERROR:.0%}", holds=calibrated)
    yield check("copied windows", shares, f"at most {MAX_COPIED:.0%}", holds=original)
    corpora, texts = [m.corpus[:8] or "unknown" for m in models], [_size(m.blocks) for m in models]
    same = not champion or candidate.corpus == champion.corpus
    yield check("corpus SHA-256", corpora, "equal", holds=bool(candidate.corpus) and same)
    yield check("validation text", texts, "equal", holds=champion is None or _same_text(candidate, champion))
    seeds = [m.params.get(SEED, "") for m in models]
    if champion and seeds[0] != seeds[1] and without_seed(candidate.params) == without_seed(champion.params):
        yield check("parameters", [f"{SEED} {seed}" for seed in seeds], f"different in more than {SEED}", holds=False)
    stored = f"{candidate.checkpoint[:8]} {'verified' if candidate.stored == candidate.checkpoint else 'differs'}"
    verified = candidate.stored == candidate.checkpoint
    yield check("checkpoint SHA-256", [stored, ""], "that of the run", holds=verified)
    if candidate.rolled_back:
        required = "never; to allow it, delete the tag promotion.rolled_back"
        yield check("rolled back", [candidate.rolled_back, ""], required, holds=False)


def _size(blocks: pd.DataFrame) -> str:
    return f"{blocks['characters'].sum():,} characters"
