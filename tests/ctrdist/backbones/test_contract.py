"""What holds for every backbone: a new file in `ctrdist/backbones/` is tested here without a line."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctrdist import backbones
from ctrdist.backbones import NAMES, Backbone, BackboneConfigs, Inputs, Shape
from ctrdist.errors import UserError
from ctrdist.group import Group, attach_group
from ctrdist.losses import binary_cross_entropy
from ctrdist.metrics import auc

B, T, F, FH, D = 8, 4, 5, 2, 3
TARGET = (3, 4)
SPLITS = [[5, 3], [8, 0], [0, 8], [1, 7]]


# Every network, and those of its options that make another network of it, written behind its name.
NETWORKS = [
    *NAMES,
    *("dcnv2 cross=vector", "dcnv2 cross=mixture", "dcnv2 cross=mixture gate=sigmoid structure=stacked"),
    *("pnn product=outer", "pnn product=both"),
    *("fibinet bilinear=all", "fibinet bilinear=each", "dien evolution=agru", "dien evolution=aigru"),
    *("autoint deep=yes", "fgcnn separate=yes"),
]
ANY_ORDER = ["fm"]  # where the order of the fields makes no difference
NOTHING_DRAWN = ["fm"]  # without weights of its own, but for a bias


def model_of(name: str, seed: int = 0, shape: Shape = Shape(F, FH, D), **options: Any) -> Backbone:  # noqa: B008
    name, *choices = name.split()
    config = getattr(BackboneConfigs(), name)
    options |= dict(choice.split("=") for choice in choices)
    options = {key: value for key, value in options.items() if key in {field.name for field in fields(config)}}
    torch.manual_seed(seed)
    return backbones.build(name, shape, replace(BackboneConfigs(), **{name: replace(config, **options)})).double()


def inputs_of(rows: slice | list[int] = slice(None), seed: int = 1) -> Inputs:
    draws = torch.Generator().manual_seed(seed)
    field_vectors = torch.randn(B, F, D, dtype=torch.float64, generator=draws)
    history = torch.randn(B, T, FH, D, dtype=torch.float64, generator=draws)
    mask = torch.arange(T) < torch.tensor([4, 2, 0, 1, 3, 4, 0, 1])[:, None]
    first_order = torch.randn(B, F + FH, dtype=torch.float64, generator=draws)
    return Inputs(field_vectors[rows], history[rows], mask[rows], TARGET, first_order[rows])


def logits(model: Backbone, inputs: Inputs) -> Tensor:
    representation, direct, _ = model.represent(inputs)
    return model.head(representation) + direct


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rows", [B, 1, 0])
def test_shapes(name: str, rows: int):
    model = model_of(name)
    for mode in (True, False):
        representation, direct, auxiliary = model.train(mode).represent(inputs_of(slice(rows)))
        assert representation.shape == (rows, model.width) and direct.shape == (rows,)
        assert model.head(representation).shape == (rows,)
        assert all(isinstance(key, str) and value.shape == () for key, value in auxiliary.items())
        assert representation.isfinite().all() and direct.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gradient_reaches_every_parameter_and_every_input(name: str):
    model, inputs = without_dropout(model_of(name)), inputs_of()
    inputs.fields.requires_grad_()
    inputs.history.requires_grad_()
    inputs.first_order.requires_grad_()
    representation, direct, auxiliary = model.represent(inputs)
    (model.head(representation) + direct).sin().sum().add(sum(auxiliary.values())).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key
    assert inputs.fields.grad.any(2).all()
    assert inputs.first_order.grad.all() if model.first_order else inputs.first_order.grad is None
    assert torch.equal(inputs.history.grad.any(3).any(2), inputs.mask)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_empty_batch_gives_zero_gradients_to_all(name: str):
    # A worker whose share is empty must take part in the exchange of gradients.
    model = model_of(name)
    binary_cross_entropy(logits(model, inputs_of(slice(0))), torch.zeros(0)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), key


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_do_not_see_each_other(name: str):
    model, order = model_of(name).eval(), [3, 0, 7, 5, 1, 2, 6, 4]
    everything = logits(model, inputs_of())
    torch.testing.assert_close(logits(model, inputs_of(order)), everything[order], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(logits(model, inputs_of(slice(2, 3))), everything[2:3], rtol=1e-12, atol=1e-14)
    assert len(everything.unique()) == B


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_padding_does_not_count(name: str, mode: str):
    model = without_dropout(model_of(name)).train(mode == "train")
    plain, rubbish, longer = inputs_of(), inputs_of(), inputs_of()
    expected = logits(model, plain)
    rubbish.history[~rubbish.mask] = 1e3
    torch.testing.assert_close(logits(model, rubbish), expected, rtol=1e-12, atol=1e-14)
    tail = torch.full((B, 3, FH, D), -7.0, dtype=torch.float64)
    longer.history = torch.cat([longer.history, tail], 1)
    longer.mask = torch.cat([longer.mask, torch.zeros(B, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(logits(model, longer), expected, rtol=1e-12, atol=1e-14)
    changed = inputs_of()
    changed.history[changed.mask] += 1
    assert torch.equal(logits(model.eval(), changed) != logits(model, plain), plain.mask.any(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_world_without_histories(name: str):
    model = model_of(name, shape=Shape(F, 0, D))
    inputs = inputs_of()
    inputs = Inputs(inputs.fields, inputs.history[:, :0, :0], inputs.mask[:, :0], (), inputs.first_order[:, :F])
    out = logits(model, inputs)
    out.sum().backward()
    assert out.shape == (B,) and out.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_histories_of_no_steps_are_empty_ones(name: str):
    model, inputs = without_dropout(model_of(name)), inputs_of()
    expected = logits(model, replace(inputs, mask=torch.zeros_like(inputs.mask)))
    out = logits(model, replace(inputs, history=inputs.history[:, :0], mask=inputs.mask[:, :0]))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_world_of_one_field(name: str):
    model, fields = model_of(name, shape=Shape(1, 0, D)), inputs_of().fields[:, :1]
    first_order = fields.new_ones(B, 1)
    out = logits(model, Inputs(fields, fields.new_zeros(B, 0, 0, D), torch.zeros(B, 0).bool(), (), first_order))
    out.sum().backward()
    assert out.shape == (B,) and out.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_order_of_the_fields_counts_but_where_it_must_not(name: str):
    model, plain, moved = model_of(name).eval(), inputs_of(), inputs_of()
    order = [4, 2, 0, 3, 1]
    moved.fields = plain.fields[:, order]
    moved.first_order = plain.first_order[:, [*order, *range(F, F + FH)]]
    moved.target = tuple(order.index(field) for field in TARGET)
    difference = (logits(model, moved) - logits(model, plain)).abs()
    assert (difference < 1e-12).all() if name in ANY_ORDER else (difference > 1e-9).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_follow_the_seed(name: str):
    first, again, other = (model_of(name, seed).state_dict() for seed in (0, 0, 1))
    assert first.keys() == again.keys()
    for key, value in first.items():
        assert torch.equal(value, again[key]) and value.isfinite().all(), key
    assert any(not torch.equal(value, other[key]) for key, value in first.items()) or name in NOTHING_DRAWN


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("where", ["fields", "history"])
def test_learns_a_pair_that_no_single_value_tells(name: str, where: str):
    # The click is the parity of one field's value plus another's, or plus a behaviour's.
    draws = torch.Generator().manual_seed(0)
    left, right = torch.randint(6, (2, 512), generator=draws)
    label = ((left + right) % 2).float()
    torch.manual_seed(0)
    vectors = nn.Embedding(12, 8)
    weights = nn.Embedding(12, 1)
    model = without_dropout(model_of(name, shape=Shape(2, 1, 8))).float()
    optimizer = torch.optim.Adam([*vectors.parameters(), *weights.parameters(), *model.parameters()], lr=1e-2)
    mask = torch.full((512, 1), where == "history")

    def score() -> Tensor:
        one, two = vectors(left), vectors(right + 6)
        other = two if where == "fields" else torch.ones_like(two)
        first_order = torch.cat([weights(right + 6), weights(left), weights(right + 6) * mask], 1)
        return logits(model, Inputs(torch.stack([other, one], 1), two[:, None, None], mask, (1,), first_order))

    for _ in range(60):
        optimizer.zero_grad()
        binary_cross_entropy(score(), label).backward()
        optimizer.step()
    model.eval()
    assert auc(label, score().detach()) > 0.95
    one_hot = torch.cat([nn.functional.one_hot(left, 6), nn.functional.one_hot(right, 6)], 1).float()
    linear = torch.linalg.lstsq(one_hot, label[:, None], driver="gelsd").solution
    assert auc(label, (one_hot @ linear)[:, 0]) < 0.65


def step_of(group: Group, name: str, options: dict[str, Any], split: list[int]) -> dict[str, Tensor]:
    """Outputs, loss, gradients and buffers after a training step's forward and backward pass on a share of the rows."""
    rows = slice(sum(split[: group.rank]), sum(split[: group.rank + 1])) if group.size > 1 else slice(None)
    model = without_dropout(model_of(name, **options))
    attach_group(model, group)
    inputs = inputs_of(rows)
    inputs.fields.requires_grad_()
    inputs.history.requires_grad_()
    representation, direct, auxiliary = model.represent(inputs)
    out = model.head(representation) + direct
    loss = binary_cross_entropy(out, torch.arange(B)[rows] % 2, group) + sum(auxiliary.values())
    loss.backward()
    seen = {"out": out.detach(), "loss": loss.detach()}
    seen |= {"inputs.fields": inputs.fields.grad, "inputs.history": inputs.history.grad}
    gradients = {f"gradient.{key}": parameter.grad for key, parameter in model.named_parameters()}
    return seen | gradients | dict(model.named_buffers())


def steps(group: Group, names: list[str], options: list[dict[str, Any]], splits: list[list[int]]) -> list[dict]:
    return [step_of(group, name, o, split) for name in names for o in options for split in splits]


def test_two_workers_have_the_batch_statistics_of_one(two_workers):
    options = [{}, {"batch_norm": True}, {"activation": "relu", "batch_norm": True, "softmax": True}]
    found = zip(*two_workers(steps, NETWORKS, options, SPLITS), strict=True)
    checked = 0
    for name in NETWORKS:
        for option in options:
            alone = step_of(Group(), name, option, [])
            for split in SPLITS:
                first, second = next(found)
                assert alone.keys() == first.keys()
                for key, value in alone.items():
                    if key == "out":
                        other = torch.cat([first[key], second[key]])
                    elif key.startswith("inputs."):
                        other = torch.cat([first[key], second[key]]) / 2
                    elif key.startswith("gradient."):
                        other = (first[key] + second[key]) / 2
                    else:
                        other = first[key]
                        assert torch.equal(other, second[key]), (name, option, split, key)
                    torch.testing.assert_close(
                        other, value, rtol=1e-8, atol=1e-11, msg=f"{name} {option} {split} {key}"
                    )
                    checked += 1
    assert checked > 100


def test_the_registry():
    published = "fm dnn widedeep deepfm xdeepfm pnn dcn dcnv2 autoint fibinet fignn fgcnn din dien"
    assert set(published.split()) <= set(NAMES) and not {"base", "layers"} & set(NAMES)
    assert [field.name for field in fields(BackboneConfigs)] == list(NAMES)
    with pytest.raises(UserError, match="--ctr.backbone dcnv3: no such backbone; did you mean 'dcnv2'"):
        backbones.build("dcnv3", Shape(F, FH, D))


def test_configurations_pickle_by_name():
    import pickle

    config = backbones.BackboneConfigs()
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("steps", [T, 0])
def test_one_history_for_all_rows_is_the_same_one_for_each(name: str, steps: int):
    model, inputs = model_of(name).eval(), inputs_of()
    one = replace(inputs, history=inputs.history[1:2, :steps], mask=inputs.mask[1:2, :steps])
    each = replace(one, history=one.history.expand(B, -1, -1, -1), mask=one.mask.expand(B, -1))
    expected = logits(model, each)
    assert expected.shape == (B,)
    torch.testing.assert_close(logits(model, one), expected)
