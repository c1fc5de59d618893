"""
Proves that SFI is the paper's equation: the folded form that runs equals the printed form, and both equal a global
attention with a mask. Also: windows lie where they should, and a query sees its own windows only.

    pytest tests/method/test_sfi.py
"""
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near

from convnext import ConvNeXt, ConvNeXtConfig
from sfi import SFI, ConcatTokens, ImageTokens, Pyramid, attention_weights, position_codes, window_partition

SIDES = (8, 4, 2, 1)


def random_maps(B, rows, cols, C, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(B, rows * k, cols * k, C, dtype=dtype, requires_grad=True) for k in SIDES]


def masked_global_sfi(sfi, queries, maps, grid):
    """A third formulation: every query against every cell of every scale, in plain loops over heads, with a mask."""
    rows, cols = grid
    B, C = maps[0].shape[0], maps[0].shape[-1]
    q = (queries @ sfi.wq.weight.T).expand(B, -1, -1)
    keys, values, owner = [], [], []
    for x, wk, wv in zip(maps, sfi.wk, sfi.wv):
        k = x.shape[1] // rows
        y, x_ = torch.meshgrid(torch.arange(x.shape[1]) // k, torch.arange(x.shape[2]) // k, indexing="ij")
        owner.append((y * cols + x_).flatten())
        keys.append(x.flatten(1, 2) @ wk.weight.T)
        values.append(x.flatten(1, 2) @ wv.weight.T)
    keys, values, owner = torch.cat(keys, 1), torch.cat(values, 1), torch.cat(owner)
    hidden = owner[None, :] != torch.arange(rows * cols)[:, None]                  # (N, all cells)
    out, hd = [], C // sfi.heads
    for h in range(sfi.heads):
        part = slice(h * hd, (h + 1) * hd)
        scores = q[..., part] @ keys[..., part].transpose(1, 2) / hd ** 0.5
        out.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values[..., part])
    return (q + torch.cat(out, -1)) @ sfi.wo.weight.T


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("grid", [(2, 2), (2, 3)])
@pytest.mark.parametrize("shared", [True, False], ids=["shared queries", "own queries"])
def test_three_formulations_agree_with_their_gradients(heads, grid, shared):
    """float64; folded against printed, and against masked global attention: outputs and every gradient to 1e-10."""
    B, C = 3, 16
    maps, sfi = random_maps(B, *grid, C), SFI(12, C, 4, 20, heads).double()
    queries = torch.randn(1 if shared else B, grid[0] * grid[1], 12, dtype=torch.float64, requires_grad=True)
    windows = [window_partition(x, grid) for x in maps]
    results = []
    for out in (sfi(queries, windows), sfi.printed(queries, windows), masked_global_sfi(sfi, queries, maps, grid)):
        loss = (out * out.detach().cos()).sum()
        gradients = torch.autograd.grad(loss, [queries, *maps, *sfi.parameters()], retain_graph=True)
        results.append([out.detach(), *gradients])
    folded, printed, masked = results
    for what, other in (("the printed SFI", printed), ("global attention with a mask", masked)):
        for ours, theirs in zip(folded, other):
            apart = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
            assert_near(f"folded SFI = {what}, outputs and gradients (float64)", apart, 1e-10)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_weights_are_those_that_sfi_uses(heads):
    """Each query's add up to 1 over all scales; with them and the printed values the output can be written down."""
    maps, sfi = random_maps(2, 2, 3, 16), SFI(12, 16, 4, 20, heads).double()
    queries, pyramid = torch.randn(2, 6, 12, dtype=torch.float64), [window_partition(x, (2, 3)) for x in maps]
    weights = attention_weights(sfi, queries, pyramid)
    assert [tuple(a.shape) for a in weights] == [(2, 6, heads, k * k) for k in SIDES]
    assert torch.allclose(sum(a.sum(-1) for a in weights), torch.ones(2, 6, heads, dtype=torch.float64))
    out = sfi.wq(queries)
    for a, wv, x in zip(weights, sfi.wv, pyramid):
        values = wv(x).unflatten(-1, (heads, -1))                                  # (B, N, cells, nh, hd)
        out = out + torch.einsum("bnhk,bnkhd->bnhd", a, values).flatten(2)
    assert (sfi.wo(out) - sfi(queries, pyramid)).abs().max() < 1e-10


def test_window_partition_puts_the_cells_under_a_query_in_its_window():
    """Cells hold their own (row, column); window (r, c) of side k must hold rows rk..rk+k-1 and columns ck..ck+k-1."""
    rows, cols, k = 2, 3, 4
    cells = torch.stack(torch.meshgrid(torch.arange(rows * k), torch.arange(cols * k), indexing="ij"), -1)[None]
    windows = window_partition(cells, (rows, cols))
    assert windows.shape == (1, rows * cols, k * k, 2)
    for i in range(rows * cols):
        r, c = divmod(i, cols)
        expected = [[r * k + y, c * k + x] for y in range(k) for x in range(k)]
        assert windows[0, i].tolist() == expected


@pytest.mark.parametrize("shape, L", [((1, 6, 6, 4), 4), ((1, 8, 4, 4), 2), ((1, 1, 2, 4), 2)])
def test_window_partition_refuses_maps_that_do_not_divide(shape, L):
    with pytest.raises(ValueError, match="cannot be cut"):
        window_partition(torch.zeros(shape), L)


def test_one_cell_changes_one_token():
    """Change one cell of the finest map: the token of the query that owns it changes, and no other."""
    grid = (3, 2)
    maps, sfi = random_maps(1, *grid, 16), SFI(16, 16, 4, 16)
    sfi, queries = sfi.double(), torch.randn(1, 6, 16, dtype=torch.float64)
    before = sfi(queries, [window_partition(x, grid) for x in maps])
    with torch.no_grad():
        maps[0][0, 17, 9] += 1.0                                                   # row 17 // 8 = 2, column 9 // 8 = 1
    after = sfi(queries, [window_partition(x, grid) for x in maps])
    assert (before != after).any(-1)[0].tolist() == [False] * 5 + [True]


def test_one_pixel_changes_only_the_tokens_within_the_encoders_reach():
    """From pixel to token, with a real encoder of small reach: tokens far from the changed pixel stay bit for bit."""
    torch.manual_seed(0)
    vision = ConvNeXt(ConvNeXtConfig((1, 0, 0, 0), (8, 8, 8, 8))).eval()
    torch.nn.init.ones_(vision.stages[0].blocks[0].gamma)
    pyramid, tokens = Pyramid((8, 8, 8, 8), 16), ImageTokens(8, 16, 4, 16)
    images = torch.randn(1, 3, 256, 256)
    changed = images.clone()
    changed[0, :, 8, 8] += 5.0                                                     # the first 32-pixel window
    with torch.no_grad():
        moved = (tokens(*pyramid(vision(images))) != tokens(*pyramid(vision(changed)))).any(-1)[0].view(8, 8)
    assert moved[0, 0] and moved.sum() == 1                                        # 7x7 cells of 4 pixels reach 12


def test_queries_see_all_four_scales():
    """The gradient of one token reaches every scale, inside its window and nowhere else."""
    grid = (2, 2)
    maps, sfi = random_maps(1, *grid, 16), SFI(16, 16, 4, 16).double()
    out = sfi(torch.randn(1, 4, 16, dtype=torch.float64), [window_partition(x, grid) for x in maps])
    for x, k in zip(torch.autograd.grad(out[0, 3].sum(), maps), SIDES):
        touched = x[0].abs().sum(-1) > 0
        assert touched[k:, k:].all() and touched.sum() == k * k


def test_position_codes_share_one_frame():
    """A coarse cell's code is the code of the place where its center lies: of 2x2 fine cells, the middle."""
    fine, coarse = position_codes(8, 8, 4, 32), position_codes(4, 4, 8, 32)
    y, x = (torch.arange(8) + 0.5)[:, None] * 4, (torch.arange(4) + 0.5)[:, None] * 8
    freq = 10000.0 ** (-torch.arange(8) / 8)
    assert torch.allclose(fine[:, 0, :8], (y / 4 * freq).sin())
    assert torch.allclose(coarse[:, 0, :8], (x / 4 * freq).sin())
    assert torch.allclose(fine[0, :, 16:24], fine[:, 0, :8])                       # columns are coded as rows are
    assert position_codes(6, 10, 4, 32).shape == (6, 10, 32)
    with pytest.raises(ValueError, match="divisible by 4"):
        position_codes(4, 4, 4, 30)


def test_learned_grid_is_resized_for_another_image():
    """Its own grid comes back as it is; another grid gets the bicubic resize of it."""
    torch.manual_seed(0)
    tokens = ImageTokens(4, 16, 4, 8)
    own = tokens.grid_queries((4, 4)) - position_codes(4, 4, 32, 16).flatten(0, 1)
    assert torch.allclose(own[0], tokens.queries.flatten(0, 1), atol=1e-6)
    other = tokens.grid_queries((3, 5)) - position_codes(3, 5, 32, 16).flatten(0, 1)
    expected = F.interpolate(tokens.queries.permute(2, 0, 1)[None], size=(3, 5), mode="bicubic")[0].permute(1, 2, 0)
    assert torch.allclose(other[0], expected.flatten(0, 1), atol=1e-5)


def test_concat_averages_each_map_to_the_coarsest():
    """The baseline's input, from windows, is what adaptive pooling makes of the whole maps; its conv sees neighbors."""
    torch.manual_seed(0)
    maps = random_maps(2, 2, 3, 16)
    tokens, seen = ConcatTokens(16, 4, 24).double(), []
    tokens.conv.register_forward_hook(lambda conv, given, out: seen.append(given[0]))
    pyramid = [window_partition(x, (2, 3)) for x in maps]
    out = tokens(pyramid, (2, 3))
    whole = torch.cat([F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (2, 3)) for x in maps], dim=1)
    assert torch.allclose(seen[0], whole) and out.shape == (2, 6, 24)
    reached = torch.autograd.grad(out[0, 0].sum(), maps[3])[0][0].abs().sum(-1) > 0
    assert reached.tolist() == [[True, True, False], [True, True, False]]


def test_maps_of_any_size_train_alike():
    """
    The maps of real weights differ in size a hundredfold from scale to scale. Multiplied by 0.03 to 300, they give the
    same pyramid and, to every weight, the same gradient: so they train as balanced maps do.
    """
    torch.manual_seed(0)
    dims = 16, 24, 32, 40
    maps = [torch.randn(2, c, 2 * k, 3 * k) for c, k in zip(dims, SIDES)]
    pyramid, tokens = Pyramid(dims, 16), ImageTokens(3, 16, 4, 8)
    own = [*pyramid.parameters(), *tokens.parameters()]

    def learn(sizes):
        out = tokens(*pyramid([size * x for size, x in zip(sizes, maps)]))
        return out, torch.autograd.grad(out.square().sum(), own)

    out, gradient = learn((1, 1, 1, 1))
    for sizes in ((0.03, 300, 1, 10), (300, 1, 30, 0.03)):
        other, moved = learn(sizes)
        assert torch.allclose(out, other, atol=1e-3)
        assert all((a - b).norm() < 2e-3 * a.norm().clamp(min=1e-2) for a, b in zip(gradient, moved))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="not a multiple of 3 heads"):
        SFI(16, 16, 4, 16, heads=3)
