"""
Hierarchical Spatial Feature Integration (Aquila, Sec. 3.3): windowed cross-attention from a grid of queries to a
pyramid of four feature maps.

Query i of an (h, w) grid looks at the k_s x k_s cells of scale s that lie under it, for every scale at once, and at
nothing else. With strides 4, 8, 16, 32 and a grid as coarse as the last map, k = 8, 4, 2, 1: 85 keys a query.

    maps -> Pyramid (projectors, position codes, windows) -> ImageTokens (learned queries + SFI) -> tokens
                                                          -> SFI again between the layers of the LM (aquila.py, MDA)

`SFI` runs the *folded* form of the paper's equations. With q a row of Q and x a key cell,

    q (W_K x)^T   = (q W_K) x^T        the query is projected with W_K, once a scale, instead of every cell
    sum_j a_j (W_V x_j) = W_V (sum_j a_j x_j)   W_V is applied to the weighted sum, instead of to every cell

so that no key and no value is ever made: at the paper's size 4,096 vectors are projected rather than 87,040. It is the
same mathematics; `printed_sfi` is the paper's form, kept to prove it by.

Shapes: B images, N = h w queries, C width, nh heads, hd = C / nh, k window side at a scale, (c, H, W) a feature map.
"""
import torch
import torch.nn.functional as F
from torch import nn


def window_partition(x, L):
    """
    in:  x (B, H, W, C); L, or (rows, cols), the grid of windows. H and W must be k times rows and cols, one k for both.
    out: (B, rows*cols, k*k, C); window i holds the cells under grid cell i, row by row.
    """
    rows, cols = (L, L) if isinstance(L, int) else L
    B, H, W, C = x.shape
    k = H // rows
    if (H, W) != (k * rows, k * cols) or k == 0:
        raise ValueError(f"a map of {H}x{W} cells cannot be cut into {rows}x{cols} square windows of whole cells")
    x = x.view(B, rows, k, cols, k, C).transpose(2, 3)                             # (B, rows, cols, k, k, C)
    return x.reshape(B, rows * cols, k * k, C)


def position_codes(H, W, stride, dim, device=None):
    """
    Fixed 2-D sin-cos codes (H, W, dim), float32, of the cells' centres in the image. The unit is the finest cell, 4
    pixels, at every scale: a coarse cell gets the code of the place where its centre lies.
    """
    if dim % 4:
        raise ValueError(f"position codes need a width divisible by 4, not {dim}")
    # ASSUMPTION: the paper says "absolute positional encodings"; sin-cos of Transformer wavelengths,
    # half for y, half for x.
    freq = 10000.0 ** (-torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    axis = lambda n: (torch.arange(n, device=device) + 0.5)[:, None] * (stride / 4) * freq       # (n, dim/4)
    y, x = axis(H)[:, None].expand(H, W, -1), axis(W)[None].expand(H, W, -1)
    return torch.cat((y.sin(), y.cos(), x.sin(), x.cos()), dim=-1)


def attend(folded, pyramid):
    """Folded queries, a list of (1|B, N, nh, C), and pyramid -> weights over all scales, a list of (B, N, nh, k*k)."""
    scores = [torch.matmul(f.to(x.dtype), x.transpose(-1, -2)) for f, x in zip(folded, pyramid)]
    weights = torch.cat(scores, dim=-1).softmax(-1)
    return [a.to(x.dtype) for a, x in zip(weights.split([x.shape[2] for x in pyramid], dim=-1), pyramid)]


class Gather(torch.autograd.Function):
    """
    (folded queries of every scale, maps of every scale) -> the weighted sum of each scale's cells, (B, N, nh, C) each.

    Plain autograd would make the gradient of the pyramid twice, once for the scores and once for the sums, and add the
    two: three passes over the largest tensors. Here it is one product: dx = ds^T f + a^T dg = [ds; a]^T [f; dg].
    """

    @staticmethod
    def forward(ctx, *tensors):
        folded, pyramid = tensors[:len(tensors) // 2], tensors[len(tensors) // 2:]
        weights = attend(folded, pyramid)
        ctx.save_for_backward(*tensors, *weights)
        return tuple(torch.matmul(a, x) for a, x in zip(weights, pyramid))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        saved, n = ctx.saved_tensors, len(grads)           # unpacked once: activation checkpointing allows no more
        folded, pyramid, weights = saved[:n], saved[n:2 * n], saved[2 * n:]
        grads = [g.to(x.dtype) for g, x in zip(grads, pyramid)]
        # Softmax: ds = a (da - sum a da), the sum over the keys of all scales.
        da = [torch.matmul(g, x.transpose(-1, -2)) for g, x in zip(grads, pyramid)]
        total = sum((a * d).sum(-1, keepdim=True) for a, d in zip(weights, da))
        ds = [a * (d - total) for a, d in zip(weights, da)]
        df = [torch.matmul(s, x).sum_to_size(f.shape).to(f.dtype) for s, x, f in zip(ds, pyramid, folded)]
        dx = [torch.matmul(torch.cat((s, a), 2).transpose(-1, -2), torch.cat((f.to(g.dtype).expand_as(g), g), 2))
              for s, a, f, g in zip(ds, weights, folded, grads)]
        return (*df, *dx)


class SFI(nn.Module):
    """
    Cross-attention of N queries, each to its own window of every scale (Sec. 3.3), in the folded form.

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
        self.wo = nn.Linear(dim, out_dim, bias=False)                              # ASSUMPTION: C -> D, no bias

    def forward(self, queries, pyramid):
        q = self.wq(queries)                                                       # Q_i = W_Q x_q(i): (1|B, N, C)
        gathered = Gather.apply(*self.folded(q), *pyramid)                         # sum_j a_j x_s(j), a scale each
        mixed = sum(self.project(g, wv.weight) for g, wv in zip(gathered, self.wv))
        return self.wo(q + mixed)                                                  # X_i* = Q_i + softmax(..) V_i

    def attention(self, q, pyramid):
        """q (1|B, N, C), W_Q applied -> softmax(Q K^T / sqrt(hd)) over all scales: a list of (B, N, nh, k*k)."""
        return attend(self.folded(q), pyramid)

    def folded(self, q):
        """Q W_Ks / sqrt(hd) of every scale: a list of (1|B, N, nh, C)."""
        scale = (q.shape[-1] // self.heads) ** -0.5
        return [self.fold(q * scale, wk.weight) for wk in self.wk]

    def fold(self, q, wk):
        """q W_K, head by head: (b, N, C), (C, C) -> (b, N, nh, C)."""
        b, N, C = q.shape
        if self.heads == 1:
            return torch.matmul(q, wk.to(q.dtype))[:, :, None]
        q, wk = q.view(b, N, self.heads, -1), wk.view(self.heads, -1, C).to(q.dtype)
        return torch.einsum("bnhd,hdc->bnhc", q, wk)

    def project(self, mean, wv):
        """W_V of each head on what that head gathered: (B, N, nh, C), (C, C) -> (B, N, C)."""
        if self.heads == 1:
            return F.linear(mean[:, :, 0], wv.to(mean.dtype))
        wv = wv.view(self.heads, -1, wv.shape[1]).to(mean.dtype)                   # (nh, hd, C)
        return torch.einsum("bnhc,hdc->bnhd", mean, wv).flatten(2)


def printed_sfi(sfi, queries, pyramid):
    """
    The equations of Sec. 3.3 as printed, keys and values of every cell computed and kept. Equals sfi(queries, pyramid).
    """
    q = sfi.wq(queries)                                                            # Q_i
    k = torch.cat([wk(x) for wk, x in zip(sfi.wk, pyramid)], dim=2)                # K_i: (B, N, 85, C)
    v = torch.cat([wv(x) for wv, x in zip(sfi.wv, pyramid)], dim=2)                # V_i
    B, N, keys, C = k.shape
    heads = lambda t: t.view(*t.shape[:-1], sfi.heads, C // sfi.heads).transpose(2, -2)          # (B, N, nh, keys, hd)
    qh = q.view(q.shape[0], N, sfi.heads, 1, C // sfi.heads)
    scores = torch.matmul(qh, heads(k).transpose(-1, -2)) * (C // sfi.heads) ** -0.5             # (B, N, nh, 1, keys)
    mixed = torch.matmul(scores.softmax(-1), heads(v)).reshape(B, N, C)
    return sfi.wo(q + mixed)


class Pyramid(nn.Module):
    """
    Four projectors, position codes, windows (Sec. 3.2 and 3.3): what every SFI of the model attends to, made once
    an image.

    in:  maps, a list of (B, c_s, H_s, W_s), finest first.
    out: a list of (B, N, k_s*k_s, C), and the grid (rows, cols) of the coarsest map, N = rows*cols.
    """

    def __init__(self, dims, dim):
        super().__init__()
        # ASSUMPTION: "a two-layer MLP" has GELU between and a hidden width of C.
        self.projectors = nn.ModuleList(nn.Sequential(nn.Linear(c, dim), nn.GELU(), nn.Linear(dim, dim)) for c in dims)

    def forward(self, maps):
        grid = tuple(maps[-1].shape[2:])
        return [window_partition(x, grid) for x in self.project(maps)], grid

    def project(self, maps):
        """-> a list of (B, H_s, W_s, C), projected and with their position codes."""
        out = []
        for s, (x, projector) in enumerate(zip(maps, self.projectors)):
            x = projector(x.permute(0, 2, 3, 1))                                   # (B, c, H, W) -> (B, H, W, C)
            # ASSUMPTION: the codes are added to the projected maps, so keys and values both carry them.
            out.append(x + position_codes(*x.shape[1:3], 4 * 2 ** s, x.shape[-1], x.device).to(x.dtype))
        return out


class ImageTokens(nn.Module):
    """The learned query grid X_q (L x L) and the first SFI: pyramid -> image tokens (B, N, out_dim)."""

    def __init__(self, side, dim, scales, out_dim, heads=1):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(side, side, dim) * 0.02)
        self.sfi = SFI(dim, dim, scales, out_dim, heads)

    def grid_queries(self, grid):
        """The learned grid, resized (bicubic) where the image's grid is another, with its position codes: (1, N, C)."""
        q = self.queries
        if tuple(q.shape[:2]) != tuple(grid):
            q = F.interpolate(q.permute(2, 0, 1)[None].float(), size=grid, mode="bicubic", align_corners=False)
            q = q[0].permute(1, 2, 0).to(self.queries.dtype)
        return (q + position_codes(*grid, 32, q.shape[-1], q.device).to(q.dtype)).flatten(0, 1)[None]

    def forward(self, pyramid, grid):
        return self.sfi(self.grid_queries(grid), pyramid)


class Concat(Pyramid):
    """
    The baseline of Sec. 4.3.1 in the place of Pyramid: the four projected maps resized to the coarsest, concatenated,
    a convolutional module to C. One scale whose windows are one cell, so that MDA can inject it in the same way.
    """

    def __init__(self, dims, dim):
        super().__init__(dims, dim)
        # ASSUMPTION: "a convolutional module": 3x3, GELU, 1x1. Resized by averaging.
        self.conv = nn.Sequential(nn.Conv2d(len(dims) * dim, dim, 3, padding=1), nn.GELU(), nn.Conv2d(dim, dim, 1))

    def forward(self, maps):
        grid = tuple(maps[-1].shape[2:])
        same = [F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid) for x in self.project(maps)]
        return [self.conv(torch.cat(same, dim=1)).flatten(2).transpose(1, 2)[:, :, None]], grid  # (B, N, 1, C)


class ConcatTokens(nn.Module):
    """The baseline's image tokens: a linear layer on each cell of the one scale."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.wo = nn.Linear(dim, out_dim, bias=False)

    def forward(self, pyramid, grid):
        return self.wo(pyramid[0][:, :, 0])
