import pytest
import torch
from torch import nn

from vitfast import backend
from vitfast.nn import LocalAttention2d
from vitfast.train.attention_view import attention_views


@pytest.fixture(autouse=True)
def plain_pytorch():
    with backend("reference"):
        yield


class TwoBlocks(nn.Module):
    """Attention blocks that are computed in another order than they are registered in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.second = LocalAttention2d(6, window_size=2, heads=3, dim_head=4)
        self.first = LocalAttention2d(2, 6, window_size=(4, 3), heads=2, dim_head=4)

    def forward(self, x):
        return self.second(nn.functional.avg_pool2d(self.first(x), 2))


def test_each_block_is_seen_with_the_input_it_gets():
    model = TwoBlocks().eval()
    images = torch.randn(3, 2, 8, 6)
    first, second = attention_views(model, images)
    assert (first.name, first.map_size, first.window_size) == ("first", (8, 6), (4, 3))
    assert (second.name, second.map_size, second.window_size) == ("second", (4, 3), (2, 2))
    assert (first.received.shape, first.by_offset.shape, first.distance.shape) == ((3, 8, 6), (2, 7, 5), (2,))
    assert (second.received.shape, second.by_offset.shape, second.distance.shape) == ((3, 4, 3), (3, 3, 3), (3,))

    with torch.no_grad():
        maps = model.second.attention_maps(nn.functional.avg_pool2d(model.first(images), 2))
    # Window 0 is the upper left one and full; what its places receive is the sum over its four queries.
    received = maps[:, 0].sum(-2).mean(1).unflatten(1, (2, 2))
    torch.testing.assert_close(second.received[:, :2, :2], received)


def test_without_hooks_left_behind():
    model = TwoBlocks().eval()
    attention_views(model, torch.randn(1, 2, 8, 6))
    assert not model.first._forward_pre_hooks
    assert not model.second._forward_pre_hooks
    with pytest.raises(ValueError, match="x must have the shape"):
        attention_views(model, torch.randn(1, 5, 8, 6))
    assert not model.first._forward_pre_hooks


def test_attention_without_contrast_is_uniform():
    model = TwoBlocks().eval()
    nn.init.zeros_(model.first.attn["to_q"].weight)
    nn.init.zeros_(model.first.pos_embedding)
    view = attention_views(model, torch.randn(2, 2, 8, 6))[0]
    torch.testing.assert_close(view.received, torch.ones(2, 8, 6))
    torch.testing.assert_close(view.distance, torch.full((2,), view.uniform_distance))


def test_a_model_without_attention_has_no_views():
    assert attention_views(nn.Conv2d(2, 2, 1).eval(), torch.randn(1, 2, 8, 6)) == []
