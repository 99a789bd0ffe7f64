import pytest
import torch

from ctrdist.backbones import deepfm, fm


def model_of(by_hand) -> deepfm.DeepFM:
    torch.manual_seed(0)
    return deepfm.DeepFM(by_hand.shape, deepfm.Config(hidden=(6, 4))).double().eval()


def test_logit_is_the_pairs_the_weights_and_the_deep_network(by_hand):
    model = model_of(by_hand)
    representation, direct, auxiliary = model.represent(by_hand.inputs)
    logits = model.head(representation) + direct
    assert auxiliary == {} and model.width == 2 + 4
    for b in by_hand.rows:
        deep, pairs = by_hand.deep(model.mlp, by_hand.joined(b)), by_hand.pairs(b)
        assert representation[b].tolist() == pytest.approx(pairs + deep, rel=1e-10, abs=1e-14)
        expected = by_hand.linear(b) + sum(pairs) + by_hand.output(model.output, deep)
        assert logits[b].item() == pytest.approx(expected, rel=1e-10)


def test_without_its_deep_part_it_is_a_factorization_machine(by_hand):
    model, machine = model_of(by_hand), fm.FM(by_hand.shape, fm.Config()).double()
    for parameter in model.output.parameters():
        torch.nn.init.zeros_(parameter)
    of_model, of_machine = (m.represent(by_hand.inputs) for m in (model, machine))
    expected = machine.head(of_machine[0]) + of_machine[1]
    torch.testing.assert_close(model.head(of_model[0]) + of_model[1], expected, rtol=1e-12, atol=1e-14)
