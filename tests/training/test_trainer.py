"""Training reduces the loss, and its bits depend on params, data and seed alone."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gpt.core.errors import UserError
from gpt.data.token_files import TokenData
from gpt.model.gpt import GPT, next_token_loss
from gpt.training.distributed import ShardedModel, process_group
from gpt.training.history import read_records
from gpt.training.muon import Muon, orthogonalize
from gpt.training.optimizer import learning_rate_at, make_optimizers
from gpt.training.run_folder import RunFolder
from gpt.training.trainer import seed_of
from tests.support.common import make_trainer, model_params, train_params

CPU = torch.device("cpu")


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_the_gradient_equals_that_of_the_whole_batch(shards: int) -> None:
    torch.manual_seed(0)
    model, x_BC = nn.Linear(3, 2), torch.randn(8, 3)
    parts = torch.split(x_BC, 8 // shards)
    with process_group(CPU, timeout_s=30) as group:
        losses = ShardedModel(model, group, shards).backward(lambda part, shard: part(parts[shard]).square().mean())
    loss = model(x_BC).square().mean()
    for weight, expected in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True):
        assert weight.grad is not None
        assert torch.allclose(weight.grad, expected, atol=1e-6)
    assert sum(losses) / shards == pytest.approx(float(loss.detach()))


def test_shards_are_summed_in_a_binary_tree() -> None:
    weight = nn.Linear(1, 1, bias=False)
    parts = torch.tensor([1e8, 1.0, -1e8, 1.0])  # in float32 1e8 + 1 is 1e8
    with process_group(CPU, timeout_s=30) as group:
        ShardedModel(weight, group, 4).backward(lambda model, shard: model(parts[shard].reshape(1, 1)).sum())
    assert weight.weight.grad is not None
    tree = (parts[0] + parts[1]) + (parts[2] + parts[3])
    sequential = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert float(weight.weight.grad) * 4 == float(tree) != float(sequential)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_rises_then_falls(schedule: str) -> None:
    rates = rates_of(schedule)
    assert rates[:10] == pytest.approx([step / 11 for step in range(1, 11)])
    assert rates[10] == pytest.approx(1.0, abs=0.011)
    assert rates[54] == pytest.approx(0.55)  # half-way down
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates_of("cosine")[20] > rates_of("linear")[20]


def rates_of(schedule: str) -> list[float]:
    params = train_params(max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1, schedule=schedule)
    return [learning_rate_at(step, params) for step in range(1, 101)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_weight_has_the_right_optimizer_and_weight_decay(optimizer: str) -> None:
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


def test_orthogonalize_brings_singular_values_near_1_and_keeps_the_vectors() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 6, 20)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices)
    in_basis = left.mT @ found @ right.mT
    diagonal = in_basis.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3)).all()
    assert torch.allclose(in_basis, torch.diag_embed(diagonal), atol=1e-3)
    assert not ((values > 0.6) & (values < 1.3)).all()


@pytest.mark.parametrize("shape", [(4, 4), (16, 4), (4, 16)])
def test_muons_update_does_not_depend_on_the_gradients_norm(shape: tuple[int, int]) -> None:
    """The norm of an update is that of an orthogonal matrix."""
    norms = []
    for scale in (1e-6, 1e6):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = scale * torch.randn(shape)
        with process_group(CPU, timeout_s=30) as group:
            Muon([weight], group, lr=0.1, momentum=0.9, weight_decay=0.0).step()
        norms.append(float(weight.detach().norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert norms[0] == pytest.approx(0.1 * 2 * max(1, (shape[0] / shape[1]) ** 0.5), rel=0.35)


def test_training_reduces_the_loss_and_records_the_best_step(data: TokenData, tmp_path: Path) -> None:
    with process_group(CPU, timeout_s=30) as group:
        trainer = make_trainer(data, group, model__n_layer=1, train__shards=1)
        folder = RunFolder(tmp_path)
        folder.history.resume(0)
        trainer.run(folder, {}, lambda record: None, lambda: False)
    records = read_records(folder.history.path)
    assert [record.step for record in records] == [10, 20, 30, 40, 50, 60]
    assert [record.step for record in records if record.val_loss] == [20, 40, 60]
    assert records[-1].val_loss is not None
    assert records[-1].val_loss < records[0].train_loss - 0.5
    best = min((record.val_loss or 99, record.step) for record in records)
    assert (trainer.progress.best_loss, trainer.progress.best_step) == best


def test_a_diverged_training_is_an_error(data: TokenData) -> None:
    with process_group(CPU, timeout_s=30) as group:
        trainer = make_trainer(data, group)
        trainer.train_step()
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(torch.inf)
        with pytest.raises(UserError, match=r"step 2: .*loss nan"):
            trainer.train_step()


MODELS: list[dict[str, object]] = [
    {"model__kind": "bigram"},
    {"model__kind": "average"},
    {"model__kind": "head", "model__position": "relative"},
    {"model__position": "learned"},
    {"model__position": "sinusoidal"},
    {"model__position": "relative"},
    {"model__position": "alibi"},
    {"model__position": "none"},
    {"model__norm": "rms", "model__activation": "swiglu", "model__bias": True},
    {"model__activation": "relu", "model__tie_embeddings": True},
    {"train__precision": "bfloat16"},
]


@pytest.mark.parametrize("changes", MODELS, ids=lambda changes: " ".join(map(str, changes.values())))
def test_every_model_reduces_the_loss_and_updates_all_weights(data: TokenData, changes: dict[str, object]) -> None:
    small = {"train__optimizer": "adamw", "train__weight_average": 0.0, "train__shards": 1, "model__n_layer": 1}
    with process_group(CPU, timeout_s=30) as group:
        trainer = make_trainer(data, group, **small, **changes)
        first = trainer.evaluate()
        initial = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        for _ in range(20):
            trainer.train_step()
        assert trainer.evaluate() < first - 0.1
    for name, weight in trainer.model.named_parameters():
        assert not torch.equal(weight, initial[name]), name


def test_seeds_are_distinct_and_in_range() -> None:
    seeds = {seed_of(seed, step, shard) for seed in range(3) for step in range(50) for shard in range(4)}
    assert len(seeds) == 600
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_the_bits_do_not_depend_on_ddps_buckets(data: TokenData) -> None:
    """One bucket for all parameters, or about one per parameter; DDP rebuilds them after the first step."""
    torch.manual_seed(0)
    model = GPT(model_params(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0), data.meta.vocab_size)
    tokens_BT = torch.randint(data.meta.vocab_size, (8, 9))

    def loss(part: nn.Module, shard: int) -> torch.Tensor:
        shard_BT = tokens_BT[2 * shard : 2 * shard + 2]
        return next_token_loss(part(shard_BT[:, :-1]), shard_BT[:, 1:])

    found = []
    for bucket_mb in (25, 0.0005):
        with process_group(CPU, timeout_s=30) as group:
            sharded = ShardedModel(model, group, 4, bucket_mb=bucket_mb)
            for _ in range(3):
                sharded.backward(loss)
        found.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert len(found[0]) == len(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
