"""
Hierarchical Spatial Feature Integration (Aquila, Sec. 3.3): windowed cross-attention from a grid of queries to four
feature maps.

Query i of a grid (rows, cols) attends to the k_s x k_s cells of scale s that lie under it, for every scale at once, and
to nothing else. With strides 4, 8, 16, 32 and a grid as coarse as the last map, k = 8, 4, 2, 1: 85 keys a query. The
windows of all scales together are the `pyramid`: it is made once an image, and every SFI of the model reads it.

    maps -> Pyramid (projectors, position codes, windows) -> ImageTokens (learned queries + SFI) -> image tokens
                                                          -> SFI again, before layers of the LM (aquila.py, MDA)

Shapes: B images, N = rows cols queries, C width, nh heads, hd = C / nh, k window side, (c, H, W) a feature map.
"""
import torch
import torch.nn.functional as F
from torch import nn

from convnext import STRIDES

# ---------------------------------------------------------------------------------------------- windows

def window_partition(x, L):
    """
    in:  x (B, H, W, C); the grid of windows, L for L x L, or (rows, cols). H, W must be k times rows, cols, of one k.
    out: (B, rows*cols, k*k, C); window i holds the cells under grid cell i, row by row.
    """
    rows, cols = (L, L) if isinstance(L, int) else L
    B, H, W, C = x.shape
    k = H // rows
    if (H, W) != (k * rows, k * cols) or k == 0:
        raise ValueError(f"a map of {H}x{W} cells cannot be cut into {rows}x{cols} square windows of whole cells")
    x = x.view(B, rows, k, cols, k, C).transpose(2, 3)                             # (B, rows, cols, k, k, C)
    return x.reshape(B, rows * cols, k * k, C)


# ---------------------------------------------------------------------------------------------- positions

def position_codes(H, W, stride, dim, device=None):
    """
    Fixed 2-D sin-cos codes (H, W, dim), float32, of the cells' centers in the image. The unit is the finest cell, 4
    pixels, at every scale: a coarse cell gets the code of the place where its center lies.
    """
    if dim % 4:
        raise ValueError(f"position codes need a width divisible by 4, not {dim}")
    # ASSUMPTION: the paper says "absolute positional encodings"; sin-cos of Transformer wavelengths,
    # half for y, half for x.
    freq = 10000.0 ** (-torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))

    def angles(n):                          # of the centers of n cells in a row: (n, dim/4)
        return (torch.arange(n, device=device) + 0.5)[:, None] * (stride / STRIDES[0]) * freq

    y = angles(H)[:, None].expand(H, W, -1)
    x = angles(W)[None].expand(H, W, -1)
    return torch.cat((y.sin(), y.cos(), x.sin(), x.cos()), dim=-1)


# ---------------------------------------------------------------------------------------------- the equation

class SFI(nn.Module):
    """
    Cross-attention of N queries, each to its own window of every scale (Sec. 3.3).

        Q_i  = W_Q x_q(i)
        K_i  = [W_K1 x_1(i_1) ; ... ; W_K4 x_4(i_4)]      the cells under query i, each scale with its own W_K
        V_i  = [W_V1 x_1(i_1) ; ... ; W_V4 x_4(i_4)]
        X_i* = Q_i + softmax(Q_i K_i^T / sqrt(C)) V_i     with heads, each on its hd = C / nh columns, by sqrt(hd)
        out  = W_O X_i*               not in the paper: its tokens have C = 1024 numbers, the LM's embeddings 4096

    in:  queries (1 or B, N, query_dim), 1 when all images share them; pyramid: a list of (B, N, k_s*k_s, C).
    out: (B, N, out_dim). B counts images.
    """

    def __init__(self, query_dim, dim, scales, out_dim, heads=1):
        super().__init__()
        if dim % heads:
            raise ValueError(f"SFI: width {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.wq = nn.Linear(query_dim, dim, bias=False)
        self.wk = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(scales))
        self.wv = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(scales))
        self.wo = nn.Linear(dim, out_dim, bias=False)                              # ASSUMPTION: linear, no bias

    def printed(self, queries, pyramid):
        """The equation as it is printed, with a key and a value of every cell. Tests prove `forward` equal to it."""
        q = self.wq(queries)                                                       # (1|B, N, C)
        k = torch.cat([wk(x) for wk, x in zip(self.wk, pyramid)], dim=2)           # (B, N, 85, C)
        v = torch.cat([wv(x) for wv, x in zip(self.wv, pyramid)], dim=2)           # (B, N, 85, C)
        qh = split_heads(q[:, :, None], self.heads)                                # (1|B, N, nh, 1, hd)
        kh = split_heads(k, self.heads)                                            # (B, N, nh, 85, hd)
        vh = split_heads(v, self.heads)
        scores = qh @ kh.transpose(-1, -2) * kh.shape[-1] ** -0.5                  # (B, N, nh, 1, 85)
        mixed = (scores.softmax(-1) @ vh).flatten(2)                               # (B, N, nh, 1, hd) -> (B, N, C)
        return self.wo(q + mixed)

    def forward(self, queries, pyramid):
        """The same, without making a key or a value: see below."""
        q = self.wq(queries)
        gathered = FoldedAttention.apply(*fold_queries(self, q), *pyramid)         # a (B, N, nh, C) for each scale
        mixed = sum(apply_wv(g, wv) for g, wv in zip(gathered, self.wv))
        return self.wo(q + mixed)


def split_heads(x, heads):
    """(B, N, keys, C) -> (B, N, nh, keys, hd)."""
    return x.unflatten(-1, (heads, -1)).transpose(2, 3)


# ---------------------------------------------------------------------------------------------- the same, cheaper
# With q a row of Q and x a cell under it, a column,
#
#     q (W_K x)           = (q W_K) x                fold W_K into the query, once per scale, instead of into every cell
#     sum_j a_j (W_V x_j) = W_V (sum_j a_j x_j)      apply W_V to the weighted sum, instead of to every cell
#
# so that no key and no value is ever made: at the paper's size 4,096 vectors are projected rather than 87,040, for keys
# and again for values. It is 7 to 13 times as fast, with less than a quarter of the memory (`checks.bench sfi`).

def fold_queries(sfi, q):
    """q (1|B, N, C), W_Q applied -> q W_Ks / sqrt(hd) of every scale s and head: a list of (1|B, N, nh, C)."""
    q = q.unflatten(-1, (sfi.heads, -1))                                           # (1|B, N, nh, hd)
    return [torch.einsum("bnhd,hdc->bnhc", q * q.shape[-1] ** -0.5, rows_of_heads(wk, sfi.heads, q.dtype))
            for wk in sfi.wk]


def rows_of_heads(linear, heads, dtype):
    """The weight (C, C) of a linear layer, cut into the rows of each head: (nh, hd, C)."""
    return linear.weight.to(dtype).unflatten(0, (heads, -1))


def softmax_weights(folded, pyramid):
    """Folded queries and pyramid -> softmax over the cells of all scales together: a list of (B, N, nh, k*k)."""
    scores = [f.to(x.dtype) @ x.transpose(-1, -2) for f, x in zip(folded, pyramid)]
    weights = torch.cat(scores, dim=-1).softmax(-1)
    weights = weights.split([x.shape[2] for x in pyramid], dim=-1)
    return [a.to(x.dtype) for a, x in zip(weights, pyramid)]


def apply_wv(gathered, wv):
    """W_V of each head on what that head gathered, (B, N, nh, C) -> (B, N, C)."""
    rows = rows_of_heads(wv, gathered.shape[2], gathered.dtype)
    return torch.einsum("bnhc,hdc->bnhd", gathered, rows).flatten(2)


def attention_weights(sfi, queries, pyramid):
    """What each query of an SFI attends to: a list of (B, N, nh, k_s*k_s), together 1 for each query and head."""
    return softmax_weights(fold_queries(sfi, sfi.wq(queries)), pyramid)


# ---------------------------------------------------------------------------------------------- the same, less traffic

class FoldedAttention(torch.autograd.Function):
    """
    (folded queries of every scale, windows of every scale) -> the weighted sum of each scale's cells, (B, N, nh, C).

    Its forward is `softmax_weights` and one product per scale. With f the folded queries, x the cells, s = f x^T the
    scores, a their softmax, g = a x the sums, and d before each its gradient: plain autograd would make dx twice, once
    by s and once by g, and add the two, three passes over the largest tensors there are. Here it is one product:
    dx = ds^T f + a^T dg = [ds; a]^T [f; dg].
    """

    @staticmethod
    def forward(ctx, *tensors):
        scales = len(tensors) // 2
        folded, pyramid = tensors[:scales], tensors[scales:]
        weights = softmax_weights(folded, pyramid)
        ctx.save_for_backward(*tensors, *weights)
        return tuple(a @ x for a, x in zip(weights, pyramid))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dg):
        saved, scales = ctx.saved_tensors, len(dg)             # unpacked once: activation checkpointing allows no more
        folded, pyramid, weights = saved[:scales], saved[scales:2 * scales], saved[2 * scales:]
        dg = [dg_i.to(x.dtype) for dg_i, x in zip(dg, pyramid)]                    # dg_i: of one scale
        # Softmax: ds = a (da - sum a da), the sum over the keys of all scales.
        da = [dg_i @ x.transpose(-1, -2) for dg_i, x in zip(dg, pyramid)]
        total = sum((a * da_i).sum(-1, keepdim=True) for a, da_i in zip(weights, da))
        ds = [a * (da_i - total) for a, da_i in zip(weights, da)]
        df = [(ds_i @ x).sum_to_size(f.shape).to(f.dtype) for ds_i, x, f in zip(ds, pyramid, folded)]
        dx = []
        for ds_i, a, f, dg_i in zip(ds, weights, folded, dg):
            f = f.to(dg_i.dtype).expand_as(dg_i)
            dx.append(torch.cat((ds_i, a), dim=2).transpose(-1, -2) @ torch.cat((f, dg_i), dim=2))
        return *df, *dx


# ---------------------------------------------------------------------------------------------- around it

class Pyramid(nn.Module):
    """
    Four projectors, position codes, windows (Sec. 3.2 and 3.3): what every SFI of the model attends to, made once
    an image.

    in:  maps, a list of (B, c_s, H_s, W_s), finest first; one map's values may be far larger than another's.
    out: a list of (B, N, k_s*k_s, C), and the grid (rows, cols) of the coarsest map, N = rows*cols.
    """

    def __init__(self, dims, dim):
        super().__init__()
        # ASSUMPTION: "a two-layer MLP" has GELU between, hidden width C. The norm before it is what ConvNeXt's own
        # detection backbone puts on each map, for one map's values may be a hundred times another's. The norm after it
        # is that of Cambrian-1 (Tong et al. 2024), the nearest public code: position codes have an RMS of 0.71, and
        # features without a norm some 0.2 at the start.
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(c, 1e-6), nn.Linear(c, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim))
            for c in dims)

    def forward(self, maps):
        grid, windows = tuple(maps[-1].shape[2:]), []
        for x, projector, stride in zip(maps, self.projectors, STRIDES):
            x = projector(x.permute(0, 2, 3, 1))                                   # (B, c, H, W) -> (B, H, W, C)
            # ASSUMPTION: the codes are added to the projected maps, so keys and values both carry them.
            codes = position_codes(*x.shape[1:3], stride, x.shape[-1], x.device)
            # A GPU's autocast makes a norm's output float32; what every SFI reads is as wide as the maps.
            windows.append(window_partition((x + codes.to(x.dtype)).to(maps[0].dtype), grid))
        return windows, grid


class ImageTokens(nn.Module):
    """The learned query grid X_q (L x L) and the first SFI: pyramid -> image tokens (B, N, out_dim)."""

    def __init__(self, side, dim, scales, out_dim, heads=1):
        super().__init__()
        # ASSUMPTION: they start far smaller than position codes, so that a query is at first almost its place alone.
        self.queries = nn.Parameter(torch.randn(side, side, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)                                              # ASSUMPTION: as Cambrian-1's
        self.sfi = SFI(dim, dim, scales, out_dim, heads)

    def grid_queries(self, grid):
        """The learned grid, resized (bicubic) where the image's grid is another, with its position codes: (1, N, C)."""
        q = self.queries
        if tuple(q.shape[:2]) != tuple(grid):
            q = F.interpolate(q.permute(2, 0, 1)[None].float(), size=grid, mode="bicubic", align_corners=False)
            q = q[0].permute(1, 2, 0).to(self.queries.dtype)
        codes = position_codes(*grid, STRIDES[-1], q.shape[-1], q.device)
        return (q + codes.to(q.dtype)).flatten(0, 1)[None]

    def forward(self, pyramid, grid):
        return self.sfi(self.norm(self.grid_queries(grid)), pyramid)


class ConcatTokens(nn.Module):
    """
    The baseline of Sec. 4.3.1 in the place of ImageTokens: each map averaged to the coarsest, the four concatenated, a
    convolutional module to C: pyramid -> image tokens (B, N, out_dim).
    """

    def __init__(self, dim, scales, out_dim):
        super().__init__()
        # ASSUMPTION: it reads what SFI reads, projected maps with position codes; finer maps are averaged to the
        # coarsest; "a convolutional module" is 3x3, GELU, 1x1; W_O as in SFI.
        self.conv = nn.Sequential(nn.Conv2d(scales * dim, dim, 3, padding=1), nn.GELU(), nn.Conv2d(dim, dim, 1))
        self.wo = nn.Linear(dim, out_dim, bias=False)

    def forward(self, pyramid, grid):
        x = torch.cat([cells.mean(2) for cells in pyramid], dim=-1)                # (B, N, 4C): the mean of each window
        x = self.conv(x.transpose(1, 2).unflatten(2, grid))                        # (B, C, rows, cols)
        return self.wo(x.flatten(2).transpose(1, 2))
