"""Make the golden files: inputs, weights and outputs of small random peers, for the tests that run without the peers.

Runs in the peers' environment and imports nothing of ours, so that a golden file cannot repeat our own mistake:
    pip install -r tests/requirements-peers.txt && python tests/make_golden.py
Every parameter is random, norms and layer scales too, so that no block is close to the identity.
"""

from pathlib import Path

import open_clip
import timm
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"


@torch.no_grad()
def randomise(model):
    for name, p in model.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        p.normal_(std=fan_in**-0.5)
        if "norm" in name and name.endswith("weight"):
            p.add_(1)
        # What writes to the residual stream is kept small: only in a small stream does the norms' epsilon show.
        if "stem" in name or name.endswith(("gamma", "conv_dw.bias")) or "downsample.1" in name:
            p.mul_(0.02)
        p.copy_(p.half())  # exact in float16, which is what is stored


@timm.models.register_model
def golden_convnext(**options):
    return timm.models.convnext_large(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), **options)


def convnext():
    """An open_clip model with its text tower, and all four maps of its trunk for both epsilons in use."""
    torch.manual_seed(0)
    vision = dict(timm_model_name="golden_convnext", timm_pool="", timm_proj="linear", image_size=64)
    text = dict(context_length=4, vocab_size=8, width=8, heads=1, layers=1)
    clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    randomise(clip)
    weights = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    save_file(weights, GOLDEN / "convnext.safetensors")

    images = torch.randn(1, 3, 96, 64).half()
    out = {"images": images}
    for eps in (1e-6, 1e-5):
        trunk = golden_convnext(norm_eps=eps, num_classes=0).eval()
        names = {name: f"visual.trunk.{name}" for name in trunk.state_dict()}
        trunk.load_state_dict({name: clip.state_dict()[theirs] for name, theirs in names.items()})
        with torch.no_grad():
            x = trunk.stem(images.float())
            for s, stage in enumerate(trunk.stages):
                x = stage(x)
                out[f"eps{eps:.0e}.map{s}"] = x.contiguous()
    save_file(out, GOLDEN / "convnext_maps.safetensors")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    convnext()
    for path in sorted(GOLDEN.iterdir()):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
