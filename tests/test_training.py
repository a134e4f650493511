"""Training learns, and its bits depend on params, data and seed alone."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt.distributed import Group, ShardedModel, joined
from gpt.errors import UserError
from gpt.history import read_records
from gpt.model import GPT, ModelParams, next_token_loss
from gpt.optimizer import learning_rate_at, make_optimizer
from gpt.params import check_section
from gpt.run_folder import RunFolder
from gpt.token_files import TokenData
from gpt.training import Trainer, TrainParams, seed_of
from tests.conftest import small_params

CPU = torch.device("cpu")


def trainer(data: TokenData, group: Group, **changes: object) -> Trainer:
    params = small_params(**changes)
    torch.manual_seed(0)
    model = GPT(check_section(Path("test"), "model", ModelParams, params), data.meta.vocab_size)
    return Trainer(check_section(Path("test"), "train", TrainParams, params), model, data, group)


def mean_square(parts: tuple[torch.Tensor, ...], model: nn.Module, shard: int) -> torch.Tensor:
    out_BC: torch.Tensor = model(parts[shard])
    return out_BC.square().mean()


def test_the_gradient_is_that_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    weights = nn.Linear(3, 2)
    x_BC = torch.randn(8, 3)
    for shards in (1, 2, 8):
        with joined(CPU, timeout_s=30) as group:
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
    with joined(CPU, timeout_s=30) as group:
        ShardedModel(weight, group, 4).backward(lambda model, shard: model(parts[shard].reshape(1, 1)).sum())
    assert weight.weight.grad is not None
    tree = (parts[0] + parts[1]) + (parts[2] + parts[3])
    row = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert float(weight.weight.grad) * 4 == float(tree) != float(row)


def test_the_rate_rises_then_falls() -> None:
    rates = [
        learning_rate_at(step, max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
        for step in range(1, 101)
    ]
    assert rates[:10] == pytest.approx([step / 11 for step in range(1, 11)])
    assert rates[10] == pytest.approx(1.0, abs=0.001)
    assert rates[54] == pytest.approx(0.55)  # half-way down
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_only_matrices_decay() -> None:
    model = GPT(ModelParams(n_layer=1, n_head=1, n_embd=4, block_size=4, dropout=0), 5)
    groups = make_optimizer(model, learning_rate=1, beta1=0.9, beta2=0.9, weight_decay=0.3).param_groups
    decays = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    for name, weight in model.named_parameters():
        assert decays[id(weight)] == (0.0 if "norm" in name else 0.3), name


def test_training_learns_and_keeps_the_best_weights(data: TokenData, tmp_path: Path) -> None:
    with joined(CPU, timeout_s=30) as group:
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
    with joined(CPU, timeout_s=30) as group:
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
    with joined(CPU, timeout_s=30) as group:
        run = trainer(data, group)
        run.train_step()
        with torch.no_grad():
            run.model.norm.weight.fill_(torch.inf)
        with pytest.raises(UserError, match=r"step 2: expected a loss below \d+ and a finite gradient, found loss nan"):
            run.train_step()


def test_seeds_of_neighbours_are_unrelated() -> None:
    seeds = {seed_of(seed, step, shard) for seed in range(3) for step in range(50) for shard in range(4)}
    assert len(seeds) == 600
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_the_bits_do_not_depend_on_ddps_buckets(data: TokenData) -> None:
    """One bucket for all parameters, or one for almost every parameter, rebuilt by DDP after its first pass."""
    torch.manual_seed(0)
    model = GPT(ModelParams(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0), data.meta.vocab_size)
    tokens_BT = torch.randint(data.meta.vocab_size, (8, 9))

    def loss(part: nn.Module, shard: int) -> torch.Tensor:
        return next_token_loss(
            part(tokens_BT[2 * shard : 2 * shard + 2, :-1]), tokens_BT[2 * shard : 2 * shard + 2, 1:]
        )

    found = []
    for bucket_mb in (25, 0.0005):
        with joined(CPU, timeout_s=30) as group:
            sharded = ShardedModel(model, group, 4, bucket_mb=bucket_mb)
            for _ in range(3):
                sharded.backward(loss)
        found.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert len(found[0]) == len(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
