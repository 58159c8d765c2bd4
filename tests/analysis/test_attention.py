import pytest
import torch

from vitfast.analysis import attention
from vitfast.functional import window_attention_weights

# (H, W), window, shift: full windows, windows cut off at the edges, shifted ones, one window larger than the map.
GRIDS = [
    ((4, 6), (2, 3), (0, 0)),
    ((5, 7), (3, 4), (0, 0)),
    ((5, 6), (2, 3), (1, 2)),
    ((3, 2), (4, 4), (0, 0)),
]


def weights_of(grid, *, scale=1.0, batch=2, heads=3, dim=4):
    map_size, window_size, shift = grid
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, batch, *map_size, heads, dim, dtype=torch.float64, generator=generator)
    return window_attention_weights(query, key, window_size=window_size, shift=shift, scale=scale)


def pairs(grid):
    """Every pair of tokens of one window: (window, query in it, key in it, query on the map, key on the map)."""
    (height, width), (rows, columns), (shift_y, shift_x) = grid
    before = (rows - shift_y) % rows, (columns - shift_x) % columns
    across = -(-(width + before[1]) // columns)

    def place(y, x):
        y, x = y + before[0], x + before[1]
        return (y // rows) * across + x // columns, (y % rows) * columns + x % columns

    tokens = [(y, x) for y in range(height) for x in range(width)]
    for q in tokens:
        for k in tokens:
            (window, i), (other, j) = place(*q), place(*k)
            if window == other:
                yield window, i, j, q, k


@pytest.mark.parametrize("grid", GRIDS)
def test_mean_distance_token_by_token(grid):
    weights = weights_of(grid)
    expected = torch.zeros(3, dtype=torch.float64)
    for window, i, j, q, k in pairs(grid):
        expected += weights[:, window, :, i, j].sum(0) * ((q[0] - k[0]) ** 2 + (q[1] - k[1]) ** 2) ** 0.5
    expected /= 2 * grid[0][0] * grid[0][1]
    torch.testing.assert_close(attention.mean_distance(weights, *grid), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_received_token_by_token(grid):
    weights = weights_of(grid)
    expected = torch.zeros(2, 3, *grid[0], dtype=torch.float64)
    for window, i, j, _, k in pairs(grid):
        expected[:, :, k[0], k[1]] += weights[:, window, :, i, j]
    torch.testing.assert_close(attention.received(weights, *grid), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_relative_to_offset_token_by_token(grid):
    weights = weights_of(grid)
    _, (rows, columns), _ = grid
    summed = torch.zeros(3, 2 * rows - 1, 2 * columns - 1, dtype=torch.float64)
    count = torch.zeros(2 * rows - 1, 2 * columns - 1)
    everything = list(pairs(grid))
    for window, i, j, q, k in everything:
        size = len({other_j for other, _, other_j, _, _ in everything if other == window})
        place = rows - 1 + k[0] - q[0], columns - 1 + k[1] - q[1]
        summed[:, place[0], place[1]] += size * weights[:, window, :, i, j].sum(0)
        count[place] += 2
    torch.testing.assert_close(attention.relative_to_offset(weights, *grid), summed / count, equal_nan=True)


@pytest.mark.parametrize("grid", GRIDS)
def test_uniform_attention_is_one_everywhere(grid):
    weights = weights_of(grid, scale=0.0)
    torch.testing.assert_close(attention.received(weights, *grid), torch.ones(2, 3, *grid[0], dtype=torch.float64))
    offsets = attention.relative_to_offset(weights, *grid)
    torch.testing.assert_close(offsets.nan_to_num(1.0), torch.ones_like(offsets))


def test_a_head_that_looks_at_itself_has_no_distance():
    weights = torch.eye(4).expand(1, 4, 1, 4, 4)
    assert attention.mean_distance(weights, (4, 4), (2, 2)).tolist() == [0.0]
    assert attention.relative_to_offset(weights, (4, 4), (2, 2))[0, 1, 1] == 4


@pytest.mark.parametrize("function", [attention.mean_distance, attention.received, attention.relative_to_offset])
def test_maps_of_another_grid_are_refused(function):
    with pytest.raises(ValueError, match=r"\(B, 4, heads, 4, 4\).*got \(1, 3, 1, 4, 4\)"):
        function(torch.zeros(1, 3, 1, 4, 4), (4, 4), (2, 2))
