"""
Proves ConvNeXt against timm and open_clip themselves: every map and every gradient on the same random weights.

    python -m pytest tests/peers/test_convnext_peers.py        # in the environment of tests/requirements-peers.txt
"""
import open_clip
import pytest
import timm
import torch
from conftest import assert_near, difference
from safetensors.torch import save_file

from convnext import CONVNEXTS, ConvNeXt, ConvNeXtConfig, load_convnext

SMALL = dict(depths=(2, 1, 3, 1), dims=(8, 24, 24, 40))        # two stages of one width still halve the side
EPS = {"convnext_large": 1e-6, "convnext_xxlarge": 1e-5}       # timm's own; the last test asks it


@torch.no_grad()
def randomize(model, seed):
    """No parameter keeps its start value; the stream stays small, so that the norms' epsilon shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.normal_(std=(p[0].numel() if p.ndim > 1 else 1) ** -0.5, generator=generator)
        if "stem" in name or name.endswith(("gamma", "conv_dw.bias")) or "downsample.1" in name:
            p.mul_(0.02)
    return model.eval()


def maps_of(trunk, images):
    x, maps = trunk.stem(images), []
    for stage in trunk.stages:
        x = stage(x)
        maps.append(x)
    return maps


@timm.models.register_model
def small_convnext_large(**options):
    return timm.models.convnext_large(**SMALL, **options)


@timm.models.register_model
def small_convnext_xxlarge(**options):
    return timm.models.convnext_xxlarge(**SMALL, **options)


@pytest.mark.parametrize("name", EPS)
@pytest.mark.parametrize("height, width", [(64, 64), (96, 160), (32, 32)])
def test_maps_and_gradients_equal_timm(tmp_path, name, height, width):
    peer = randomize(timm.create_model(f"small_{name}", num_classes=10), seed=height)
    save_file(peer.state_dict(), tmp_path / "timm.safetensors")
    ours = load_convnext(tmp_path / "timm.safetensors", ConvNeXtConfig(**SMALL, eps=EPS[name]))
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(width))
    theirs, mine = maps_of(peer, images), ours(images)
    for s in range(4):
        assert_near("ConvNeXt = timm's, all four maps", difference(mine[s], theirs[s]), 1e-5)
    for maps in (theirs, mine):
        sum(x.square().mean() / x.detach().square().mean() for x in maps).backward()
    gradients = {key: p.grad for key, p in peer.named_parameters()}
    for key, p in ours.named_parameters():
        assert_near("ConvNeXt = timm's, gradients", difference(p.grad, gradients[key]), 1e-4)   # sums of both signs


@pytest.mark.parametrize("name", EPS)
@pytest.mark.parametrize("head", ["mlp", "linear"])            # of convnext_large_d and of convnext_xxlarge
def test_an_open_clip_model_loads(tmp_path, name, head):
    vision = dict(timm_model_name=f"small_{name}", timm_pool="avg", timm_proj=head, image_size=64)
    text = dict(context_length=4, vocab_size=8, width=8, heads=1, layers=1)
    clip = randomize(open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text), seed=2)
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    ours = load_convnext(tmp_path / "open_clip_pytorch_model.bin", ConvNeXtConfig(**SMALL, eps=EPS[name]))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs, mine = maps_of(clip.visual.trunk, images), ours(images)
        for s in range(4):
            assert_near("ConvNeXt = open_clip's, all four maps", difference(mine[s], theirs[s]), 1e-5)
        # The maps are what CLIP itself goes on from: its own head on our last map gives its image feature.
        feature = clip.visual.head(clip.visual.trunk.forward_head(mine[-1]))
        assert difference(feature, clip.visual(images)) <= 1e-5


@pytest.mark.parametrize("ours, theirs", [("large", "convnext_large_d_320"), ("xxlarge", "convnext_xxlarge")])
def test_published_models_have_our_names_shapes_and_epsilon(ours, theirs):
    config = open_clip.get_model_config(theirs)
    with torch.device("meta"):
        trunk = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"]).visual.trunk
        model = ConvNeXt(CONVNEXTS[ours])
    expected = {name: p.shape for name, p in trunk.state_dict().items() if not name.startswith("head.")}
    assert {name: p.shape for name, p in model.state_dict().items()} == expected
    norms = [m.eps for name, m in trunk.named_modules() if isinstance(m, torch.nn.LayerNorm) and "head" not in name]
    assert set(norms) == {CONVNEXTS[ours].eps}
