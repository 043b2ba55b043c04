"""The projection head's layers, and prototypes that stay on the sphere."""

import torch
from torch import nn

from pipeline.models.heads import MLP, ProjectionHead, Prototypes
from pipeline.recipe.method import Head


def test_batch_norm_and_relu_stand_between_layers_only() -> None:
    with_norm = ProjectionHead(6, Head(hidden=(5, 4), output=3))
    kinds = [type(layer) for layer in with_norm.layers]
    between = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [*between, *between, nn.Linear]
    without = ProjectionHead(6, Head(hidden=(5, 4), output=3, batch_norm=False))
    assert [type(layer) for layer in without.layers] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert without(torch.randn(2, 6)).shape == (2, 3)


def test_an_mlp_ends_with_a_linear_layer_a_bias_or_a_norm_without_affine() -> None:
    between = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    plain, bias = MLP((6, 5, 4, 3), end="plain").layers, MLP((6, 5, 4, 3), end="bias").layers
    norm = MLP((6, 5, 4, 3), end="batch_norm").layers
    for layers, last in ((plain, []), (bias, []), (norm, [nn.BatchNorm1d])):
        assert [type(layer) for layer in layers] == [*between, *between, nn.Linear, *last]
    assert [layers[6].bias is not None for layers in (plain, bias, norm)] == [False, True, False]
    assert norm[7].weight is None


def test_no_hidden_layer_is_one_linear_map() -> None:
    head = ProjectionHead(6, Head(hidden=(), output=3))
    assert [type(layer) for layer in head.layers] == [nn.Linear]


def test_prototypes_are_unit_vectors_from_the_start_and_again_after_normalise() -> None:
    prototypes = Prototypes(8, 20)
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(20))
    with torch.no_grad():
        prototypes.weight.mul_(3)
    prototypes.normalise()
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(20))


def test_frozen_prototypes_score_alike_with_a_gradient_of_zero() -> None:
    prototypes = Prototypes(8, 20)
    embeddings = torch.randn(4, 8, requires_grad=True)
    frozen = prototypes(embeddings, frozen=True)
    torch.testing.assert_close(frozen, prototypes(embeddings), rtol=0, atol=0)
    frozen.square().sum().backward()
    assert prototypes.weight.grad is not None and not prototypes.weight.grad.any()
    assert embeddings.grad is not None and bool(embeddings.grad.any())
