"""Training learns, and its bits depend on params, data and seed alone."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt.core.errors import UserError
from gpt.core.params import check_section
from gpt.data.token_files import TokenData
from gpt.model.baselines import make_model
from gpt.model.config import ModelConfig
from gpt.model.gpt import GPT, next_token_loss
from gpt.training.distributed import Group, ShardedModel, process_group
from gpt.training.history import read_records
from gpt.training.muon import Muon, orthogonalize
from gpt.training.optimizer import learning_rate_at, make_optimizers
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import Trainer, TrainParams, seed_of
from tests.support.common import model_params, small_params, train_params

CPU = torch.device("cpu")


def trainer(data: TokenData, group: Group, **changes: object) -> Trainer:
    params = small_params(**changes)
    torch.manual_seed(0)
    model = GPT(check_section(Path("test"), "model", ModelConfig, params), data.meta.vocab_size)
    return Trainer(check_section(Path("test"), "train", TrainParams, params), model, data, group)


def mean_square(parts: tuple[torch.Tensor, ...], model: nn.Module, shard: int) -> torch.Tensor:
    out_BC: torch.Tensor = model(parts[shard])
    return out_BC.square().mean()


def test_the_gradient_is_that_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    weights = nn.Linear(3, 2)
    x_BC = torch.randn(8, 3)
    for shards in (1, 2, 8):
        with process_group(CPU, timeout_s=30) as group:
            sharded = ShardedModel(weights, group, shards)
            parts = torch.split(x_BC, 8 // shards)
            losses = sharded.backward(partial(mean_square, parts))
        assert weights.weight.grad is not None
        found = weights.weight.grad.clone()
        weights.zero_grad()
        weights(x_BC).square().mean().backward()
        assert torch.allclose(found, weights.weight.grad, atol=1e-6)
        assert len(losses) == shards


def test_shards_are_summed_in_a_tree_not_in_a_row() -> None:
    weight = nn.Linear(1, 1, bias=False)
    parts = torch.tensor([1e8, 1.0, -1e8, 1.0])  # in float32 the ones are lost beside 1e8, but not beside 0
    with process_group(CPU, timeout_s=30) as group:
        ShardedModel(weight, group, 4).backward(lambda model, shard: model(parts[shard].reshape(1, 1)).sum())
    assert weight.weight.grad is not None
    tree = (parts[0] + parts[1]) + (parts[2] + parts[3])
    row = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert float(weight.weight.grad) * 4 == float(tree) != float(row)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_rises_then_falls(schedule: str) -> None:
    rates = rates_of(schedule)
    assert rates[:10] == pytest.approx([step / 11 for step in range(1, 11)])
    assert rates[10] == pytest.approx(1.0, abs=0.011)
    assert rates[54] == pytest.approx(0.55)  # half-way down
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def rates_of(schedule: str) -> list[float]:
    params = train_params(max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1, schedule=schedule)
    return [learning_rate_at(step, params) for step in range(1, 101)]


def test_half_a_cosine_leaves_slowly_a_line_at_once() -> None:
    assert rates_of("cosine")[20] > rates_of("linear")[20]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_weight_is_moved_by_the_optimizer_that_is_made_for_it(optimizer: str) -> None:
    model = GPT(model_params(n_layer=1, n_head=1, n_embd=4, block_size=4, position="learned"), 5)
    params = train_params(optimizer=optimizer, weight_decay=0.3, muon_weight_decay=0.2)
    with process_group(CPU, timeout_s=30) as group:
        optimizers = make_optimizers(params, model, group)
    decays = {
        id(weight): (type(one).__name__, group["weight_decay"])
        for one in optimizers
        for group in one.param_groups
        for weight in group["params"]
    }
    for name, weight in model.named_parameters():
        expected = ("AdamW", 0.0 if weight.dim() < 2 else 0.3)
        if optimizer == "muon" and name.startswith("blocks") and weight.dim() == 2:
            expected = ("Muon", 0.2)
        assert decays[id(weight)] == expected, name


def test_muon_brings_singular_values_near_one_and_keeps_their_vectors() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 6, 20)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices)
    in_their_basis = left.mT @ found @ right.mT
    diagonal = in_their_basis.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    assert torch.allclose(in_their_basis, torch.diag_embed(diagonal), atol=1e-3)
    assert not ((values > 0.6) & (values < 1.3)).all()


@pytest.mark.parametrize("shape", [(4, 4), (16, 4), (4, 16)])
def test_muon_steps_as_far_for_any_gradient(shape: tuple[int, int]) -> None:
    """The length of a step is that of an orthogonal matrix, not of the gradient."""
    lengths = []
    for scale in (1e-6, 1e6):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = scale * torch.randn(shape)
        with process_group(CPU, timeout_s=30) as group:
            Muon([weight], group, lr=0.1, momentum=0.9, weight_decay=0.0).step()
        lengths.append(float(weight.detach().norm()))
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)
    assert lengths[0] == pytest.approx(0.1 * 2 * max(1, (shape[0] / shape[1]) ** 0.5), rel=0.35)


def test_training_learns_and_keeps_the_best_weights(data: TokenData, tmp_path: Path) -> None:
    with process_group(CPU, timeout_s=30) as group:
        run = trainer(data, group)
        folder = RunFolder(tmp_path)
        folder.history.resume(0)
        run.run(folder, {}, lambda record: None, lambda: False)
    records = read_records(folder.history.path)
    assert [record.step for record in records] == [10, 20, 30, 40, 50, 60]
    assert [record.step for record in records if record.val_loss] == [20, 40, 60]
    assert records[-1].val_loss is not None
    assert records[-1].val_loss < records[0].train_loss - 0.5
    best = min((record.val_loss or 99, record.step) for record in records)
    assert (run.progress.best_loss, run.progress.best_step) == best


def test_a_state_continues_as_if_nothing_had_happened(data: TokenData) -> None:
    with process_group(CPU, timeout_s=30) as group:
        whole = trainer(data, group)
        for _ in range(6):
            last = whole.train_step()
        whole.evaluate()
        first = trainer(data, group)
        for _ in range(3):
            first.train_step()
        metadata, tensors = first.state({})
        second = trainer(data, group)
        torch.manual_seed(99)
        second.restore(metadata, tensors)
        for _ in range(3):
            again = second.train_step()
        second.evaluate()
    assert again == last
    assert second.progress == whole.progress
    for name, weight in whole.best.items():
        assert torch.equal(weight, second.best[name]), name


def test_a_gradient_that_blows_up_stops_the_training(data: TokenData) -> None:
    with process_group(CPU, timeout_s=30) as group:
        run = trainer(data, group)
        run.train_step()
        with torch.no_grad():
            next(run.model.parameters()).fill_(torch.inf)
        with pytest.raises(UserError, match=r"step 2: expected a loss below \d+ and a finite gradient, found loss nan"):
            run.train_step()


FAMILY: list[dict[str, object]] = [
    {"model__kind": "bigram"},
    {"model__kind": "average"},
    {"model__kind": "head", "model__position": "learned"},
    {"model__kind": "head", "model__position": "relative"},
    {"model__position": "learned"},
    {"model__position": "sinusoidal"},
    {"model__position": "relative"},
    {"model__position": "alibi"},
    {"model__position": "none"},
    {"model__norm": "rms", "model__activation": "swiglu", "model__bias": True},
    {"model__activation": "relu", "model__tie_embeddings": True, "train__optimizer": "adamw"},
]


@pytest.mark.parametrize("changes", FAMILY, ids=lambda changes: " ".join(map(str, changes.values())))
def test_every_member_of_the_family_learns_with_all_of_its_weights(data: TokenData, changes: dict[str, object]) -> None:
    """In bfloat16, as the default does."""
    with process_group(CPU, timeout_s=30) as group:
        params = small_params(train__max_steps=25, train__weight_average=0.0, **changes)
        torch.manual_seed(0)
        model = make_model(check_section(Path("test"), "model", ModelConfig, params), data.meta.vocab_size)
        run = Trainer(check_section(Path("test"), "train", TrainParams, params), model, data, group)
        first, begun = run.evaluate(), {name: weight.clone() for name, weight in model.state_dict().items()}
        for _ in range(25):
            run.train_step()
        assert run.evaluate() < first - 0.1
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, begun[name]), name


def test_seeds_of_neighbours_are_unrelated() -> None:
    seeds = {seed_of(seed, step, shard) for seed in range(3) for step in range(50) for shard in range(4)}
    assert len(seeds) == 600
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_the_bits_do_not_depend_on_ddps_buckets(data: TokenData) -> None:
    """One bucket for all parameters, or one for almost every parameter, rebuilt by DDP after its first pass."""
    torch.manual_seed(0)
    model = GPT(model_params(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0), data.meta.vocab_size)
    tokens_BT = torch.randint(data.meta.vocab_size, (8, 9))

    def loss(part: nn.Module, shard: int) -> torch.Tensor:
        return next_token_loss(
            part(tokens_BT[2 * shard : 2 * shard + 2, :-1]), tokens_BT[2 * shard : 2 * shard + 2, 1:]
        )

    found = []
    for bucket_mb in (25, 0.0005):
        with process_group(CPU, timeout_s=30) as group:
            sharded = ShardedModel(model, group, 4, bucket_mb=bucket_mb)
            for _ in range(3):
                sharded.backward(loss)
        found.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert len(found[0]) == len(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
