"""
The mask-aware extractor of Aquila-plus (arXiv 2411.06142): a region, given as a mask, becomes two tokens.

    mask token      what is inside: each of the four raw feature maps averaged under the mask, a linear layer a scale,
                    summed, and a linear layer to the LM's width
    spatial token   where it lies and how it is shaped: the mask itself, 224 x 224, through an MLP of three layers

The two tokens and the sizes are those of a summary of the paper (the paper itself was not at hand) and of Osprey (Yuan
et al. 2023), which it extends. One thing differs on purpose. Osprey brings a mask to a map's size by bilinear
interpolation and `> 0`: a ship of 8 x 8 pixels then covers no cell at stride 32, and its feature there is zero. Here a
cell counts by the area of it that the mask covers (ASSUMPTION), so that no region vanishes; pooling="binary" pools the
maps as Osprey does. (Osprey's spatial mask is 112 x 112, bilinear, its gray values kept.)
"""
import torch
import torch.nn.functional as F
from torch import nn


def mask_weights(masks, size, pooling="area"):
    """
    in:  masks (B, R, h, w), bool or in [0, 1]; size (H, W) of a map.
    out: (B, R, H, W) float, how much each cell counts: "binary", 0 or 1; "area", the covered share of it (where H does
         not divide h, cells overlap by up to a pixel, as adaptive_avg_pool2d cuts them).
    """
    masks = masks if masks.is_floating_point() else masks.float()
    if pooling == "area":
        return F.adaptive_avg_pool2d(masks, size)
    if pooling == "binary":                 # Osprey, mask_extractor.py
        return (F.interpolate(masks, size, mode="bilinear", align_corners=False) > 0).to(masks.dtype)
    raise ValueError(f"pooling {pooling!r}: expected area or binary")


def mask_pool(features, masks, pooling="area"):
    """
    The mean of a map under each mask, cells weighted by mask_weights.
    in:  features (B, c, H, W); masks (B, R, h, w) of any size, bool or in [0, 1], R may be 0.
    out: (B, R, c) in the features' dtype; 0 for an empty mask, so that batches may be padded with them.
    """
    B, R = masks.shape[:2]
    if R == 0:
        return features.new_zeros(B, 0, features.shape[1])
    weights = mask_weights(masks, features.shape[2:], pooling).flatten(2)          # (B, R, H*W)
    mass = weights.sum(-1, keepdim=True)
    share = torch.where(mass > 0, weights / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
    return share.to(features.dtype) @ features.flatten(2).transpose(1, 2)


class MaskExtractor(nn.Module):
    """dims: channels of the feature maps; out_dim: the LM's width; dim: width between; side: of the spatial mask."""

    def __init__(self, dims, out_dim, dim=1024, side=224, pooling="area"):
        super().__init__()
        self.side, self.pooling = side, pooling
        self.scales = nn.ModuleList(nn.Linear(c, dim) for c in dims)
        self.out = nn.Linear(dim, out_dim)
        self.spatial = nn.Sequential(nn.Linear(side * side, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
                                     nn.Linear(dim, out_dim))

    def forward(self, maps, masks):
        """
        in:  maps, one (B, c_s, H_s, W_s) a scale; masks (B, R, h, w), bool or in [0, 1], padded with empty ones.
        out: mask tokens and spatial tokens, each (B, R, D).
        """
        dtype = self.out.weight.dtype
        pooled = [mask_pool(x.to(dtype), masks, self.pooling) for x in maps]
        inside = self.out(sum(linear(p) for linear, p in zip(self.scales, pooled)))
        small = masks.new_zeros(len(masks), 0, self.side ** 2)
        if masks.shape[1]:                  # ASSUMPTION: the spatial mask is made smaller as the pooling does it
            small = mask_weights(masks, (self.side, self.side), self.pooling).flatten(2)
        return inside, self.spatial(small.to(dtype))
