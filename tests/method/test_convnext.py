"""
Proves that ConvNeXt equals timm's on golden files, that every published layout loads to the same model, and that
nothing else loads. The golden files come from checks/make_golden.py; live against timm and open_clip: tests/peers.

    pytest tests/method/test_convnext.py
"""
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, assert_near, difference, one_line
from safetensors.torch import load_file, save_file

from convnext import CONVNEXTS, ConvNeXt, ConvNeXtConfig, load_convnext, read_config

WEIGHTS = GOLDEN / "convnext.safetensors"
DEPTHS, DIMS = (1, 2, 1, 1), (8, 16, 24, 32)


@pytest.fixture(scope="module")
def model():
    return load_convnext(WEIGHTS)


@pytest.fixture(scope="module")
def golden():
    return {name: tensor.float() for name, tensor in load_file(GOLDEN / "convnext_maps.safetensors").items()}


# ---------------------------------------------------------------------------------------------- the network

@pytest.mark.parametrize("eps, other", [("1e-06", "1e-05"), ("1e-05", "1e-06")])
def test_every_map_equals_timm(golden, eps, other):
    maps = load_convnext(WEIGHTS, ConvNeXtConfig(DEPTHS, DIMS, float(eps)))(golden["images"])
    assert len(maps) == 4
    for s, x in enumerate(maps):
        assert_near("ConvNeXt = timm's, all four maps (golden files)", difference(x, golden[f"eps{eps}.map{s}"]), 1e-5)
        assert difference(x, golden[f"eps{other}.map{s}"]) > 1e-3                  # the golden files see the epsilon


def test_strides_and_memory_formats(model):
    images = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    maps = model(images)
    assert [tuple(x.shape) for x in maps] == [(2, 8, 24, 40), (2, 16, 12, 20), (2, 24, 6, 10), (2, 32, 3, 5)]
    strided = torch.zeros(2, 3, 160, 96).permute(0, 1, 3, 2).copy_(images)
    for other in (images.contiguous(memory_format=torch.channels_last), strided):
        assert other.stride() != images.stride()
        for ours, same in zip(model(other), maps):
            assert difference(ours, same) < 1e-6


def test_an_image_does_not_depend_on_its_batch(model):
    images = torch.randn(3, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    for alone, together in zip(model(images[1:2]), model(images)):
        assert difference(alone, together[1:2]) < 1e-6


def test_bfloat16_and_autocast(model, golden):
    half = load_convnext(WEIGHTS, dtype=torch.bfloat16)
    exact = model(golden["images"])
    for x, true in zip(half(golden["images"].bfloat16()), exact):
        assert x.dtype == torch.bfloat16
        assert difference(x.float(), true) < 0.1                                   # 8 bits a number, five blocks
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x, true in zip(model(golden["images"]), exact):
            assert difference(x.float(), true) < 0.1


def test_a_new_model_learns():
    torch.manual_seed(0)
    model = ConvNeXt(ConvNeXtConfig(DEPTHS, DIMS))
    gammas = [p for name, p in model.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == sum(DEPTHS) and all(torch.equal(g, torch.full_like(g, 1e-6)) for g in gammas)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, wanted, losses = torch.randn(2, 3, 64, 64), torch.randn(2, 32, 2, 2), []
    for _ in range(10):
        loss = (model(images)[-1] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert losses[-1] < 0.9 * losses[0]


def test_published_sizes():
    """Numbers of parameters: timm's without the head's norm."""
    counts = {"tiny": 1_899_872, "femto": 4_832_016, "large": 196_227_264, "xxlarge": 843_391_872}
    for name, config in CONVNEXTS.items():
        with torch.device("meta"):
            model = ConvNeXt(config)
            maps = model(torch.empty(1, 3, 1024, 512))
        assert sum(p.numel() for p in model.parameters()) == counts[name]
        assert [tuple(x.shape[1:]) for x in maps] == [(c, 256 >> s, 128 >> s) for s, c in enumerate(config.dims)]
        assert read_config({key: tuple(p.shape) for key, p in model.state_dict().items()}) == config
    assert [CONVNEXTS[name].eps for name in ("tiny", "large", "xxlarge")] == [1e-6, 1e-6, 1e-5]


@pytest.mark.parametrize("shape", [(1, 3, 80, 64), (1, 3, 64, 80), (1, 3, 0, 32), (3, 64, 64), (1, 4, 64, 64)])
def test_images_that_do_not_fit(model, shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))) as error:
        model(torch.zeros(shape))
    assert "multiples of 32" in str(error.value) and one_line(error)


# ---------------------------------------------------------------------------------------------- the loader

def facebook_name(name):
    """The name that the original repository gives to timm's `name`."""
    stem = re.fullmatch(r"stem\.([01]\..*)", name)
    down = re.fullmatch(r"stages\.(\d)\.downsample\.(.*)", name)
    block = re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.*)", name)
    if stem:
        return f"downsample_layers.0.{stem[1]}"
    if down:
        return f"downsample_layers.{down[1]}.{down[2]}"
    rest = block[3].replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
    return f"stages.{block[1]}.{block[2]}.{rest}"


def published(layout):
    clip = load_file(WEIGHTS)
    if layout == "open_clip":
        return clip
    trunk = {name.removeprefix("visual.trunk."): t for name, t in clip.items() if name.startswith("visual.trunk.st")}
    if layout == "timm":
        left_out = ("head.norm.weight", "head.fc.weight", "norm_pre.weight")
    else:
        trunk = {facebook_name(name): t for name, t in trunk.items()}
        left_out = ("norm.weight", "norm.bias", "head.weight", "head.bias")
    return trunk | {name: torch.ones(DIMS[-1]) for name in left_out}


def write(tensors, path, how):
    if how == "safetensors":
        save_file(tensors, path)
    elif how == "zip":
        torch.save(tensors, path)
    elif how == "legacy":                   # before torch 1.6
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    elif how == "wrapped in model":
        torch.save({"model": tensors}, path)
    elif how == "training checkpoint":      # of open_clip, from several devices
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in tensors.items()}}, path)


@pytest.mark.parametrize("layout", ["open_clip", "timm", "facebook"])
@pytest.mark.parametrize("how, suffix", [("safetensors", ".safetensors"), ("zip", ".pt"), ("legacy", ".bin"),
                                         ("wrapped in model", ".pth"), ("training checkpoint", ".pt")])
def test_every_layout_loads_to_the_same_model(model, tmp_path, layout, how, suffix):
    path = tmp_path / f"weights{suffix}"
    write(published(layout), path, how)
    loaded = load_convnext(str(path))
    assert loaded.config == ConvNeXtConfig(DEPTHS, DIMS, 1e-6)
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    trunk = {name: t for name, t in load_file(WEIGHTS).items() if name.startswith("visual.trunk.st")}
    assert len(loaded.state_dict()) == len(trunk)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trunk[f"visual.trunk.{name}"].float()), name


@pytest.mark.parametrize("what, name, says", [
    ("missing", "visual.trunk.stem.0.weight", "1 missing: stem.0.weight (8, 3, 4, 4)"),
    ("missing", "visual.trunk.stages.1.blocks.0.gamma", "1 missing: stages.1.blocks.0.gamma (16,)"),
    ("missing", "visual.trunk.stages.3.downsample.1.bias", "1 missing: stages.3.downsample.1.bias (32,)"),
    ("unexpected", "visual.trunk.stages.0.blocks.0.mlp.grn.weight",
     "1 unexpected: visual.trunk.stages.0.blocks.0.mlp.grn.weight (5, 7)"),
    ("unexpected", "visual.extra", "1 unexpected: visual.extra (5, 7)"),
    ("misshapen", "visual.trunk.stages.0.blocks.0.gamma",
     "1 misshapen: visual.trunk.stages.0.blocks.0.gamma (5, 7) instead of (8,)"),
    ("misshapen", "visual.trunk.stages.2.blocks.0.mlp.fc1.weight",
     "1 misshapen: visual.trunk.stages.2.blocks.0.mlp.fc1.weight (5, 7) instead of (96, 24)"),
])
def test_a_file_that_does_not_fit_is_refused(tmp_path, what, name, says):
    tensors = published("open_clip")
    if what == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.ones(5, 7)
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        load_convnext(tmp_path / "weights.safetensors")
    assert one_line(error) and str(error.value).count("visual") == says.count("visual")


def test_at_most_five_names_of_each_kind(tmp_path):
    tensors = published("timm") | {f"extra.{i}": torch.ones(1) for i in range(8)}
    for name in [name for name in tensors if name.endswith("fc1.bias")]:
        tensors[name] = torch.ones(3)
    del tensors["stem.1.weight"]
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="1 missing: stem.1.weight.*; 8 unexpected: .*; 5 misshapen: ") as error:
        load_convnext(tmp_path / "weights.safetensors")
    assert str(error.value).count("extra.") == 5 and "..., " not in str(error.value) and one_line(error)


def test_two_names_of_one_tensor(tmp_path):
    tensors = published("timm")
    save_file(tensors | {"module.stem.0.bias": torch.ones(8)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="stem.0.bias and .*stem.0.bias are both stem.0.bias") as error:
        load_convnext(tmp_path / "weights.safetensors")
    assert one_line(error)


def test_a_config_from_json_is_the_same_config():
    config = ConvNeXtConfig(list(DEPTHS), list(DIMS))
    assert config == ConvNeXtConfig(DEPTHS, DIMS) and load_convnext(WEIGHTS, config).config == config


def test_a_config_that_the_file_contradicts():
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 1\).*\(8, 16, 24, 32\).*\(2, 2, 4, 2\)") as error:
        load_convnext(WEIGHTS, CONVNEXTS["tiny"])
    assert one_line(error)


class Hostile:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path, zipped):
    hostile = Hostile()
    hostile.path = str(tmp_path / "it-ran")
    path = tmp_path / "weights.pt"
    torch.save(published("timm") | {"head.norm.bias": hostile}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"refused, its pickle wants to run \w+\.mkdir") as error:
        load_convnext(path)
    assert one_line(error) and not (tmp_path / "it-ran").exists()


def legacy_half():
    buffer = io.BytesIO()
    torch.save(published("timm"), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()[:20_000]


@pytest.mark.parametrize("name, content, says", [
    ("a.pt", b"<html>404</html>", "not a whole PyTorch file"),
    ("a.pt", b"", "not a whole PyTorch file (it ends too early)"),
    ("a.bin", legacy_half(), "not a whole PyTorch file"),
    ("a.safetensors", WEIGHTS.read_bytes()[:20_000], "not a whole safetensors file"),
    ("a.safetensors", b"version https://git-lfs.github.com/spec/v1", "not a whole safetensors file"),
    ("a.ckpt", b"", "expected weights that end in .safetensors, .bin, .pt or .pth"),
])
def test_files_that_are_no_weights(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}: {says}")) as error:
        load_convnext(tmp_path / name)
    assert one_line(error)


@pytest.mark.parametrize("content, says", [
    ({"visual.conv1.weight": torch.ones(3)}, "no ConvNeXt in it"),
    ({"visual.trunk.blocks.0.norm1.weight": torch.ones(3)}, "expected a ConvNeXt of four stages"),
    ({"stem.0.weight": torch.ones(3), "epoch": 3}, "something else than named tensors"),
    (torch.ones(3), "something else than named tensors"),
])
def test_weights_of_something_else(tmp_path, content, says):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=says) as error:
        load_convnext(tmp_path / "weights.pt")
    assert one_line(error)


@pytest.mark.parametrize("path", ["nowhere.safetensors", "."])
def test_a_missing_file(tmp_path, path):
    with pytest.raises(FileNotFoundError, match="is not there") as error:
        load_convnext(tmp_path / path)
    assert one_line(error)


STREAM = """
import dataclasses, re, sys
import torch
import convnext

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

def watched(path, open_tensors=convnext.open_tensors):
    def watch(read):
        tensor = read()
        seen.append(anonymous())
        return tensor
    return {name: dataclasses.replace(stored, read=lambda read=stored.read: watch(read))
            for name, stored in open_tensors(path).items()}

*paths, small = sys.argv[1:]
convnext.load_convnext(small)               # what the libraries allocate once
convnext.open_tensors = watched
for path in paths:
    seen, before = [], anonymous()
    model = convnext.load_convnext(path, dtype=torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print((max(*seen, anonymous()) - before) / size)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from Linux' /proc")
def test_loading_holds_one_copy(tmp_path):
    with torch.device("meta"):
        shapes = ConvNeXt(ConvNeXtConfig((1, 1, 4, 1), (64, 128, 384, 512))).state_dict()
    tensors = {name: torch.zeros(t.shape) for name, t in shapes.items()}
    tensors["head.fc.weight"] = torch.zeros(5000, 1024)                        # never read
    paths = [tmp_path / "weights.safetensors", tmp_path / "weights.bin"]
    for path, how in zip(paths, ("safetensors", "zip")):
        write(tensors, path, how)
    run = subprocess.run([sys.executable, "-c", STREAM, *paths, WEIGHTS], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peaks = [float(line) for line in run.stdout.split()]
    assert len(peaks) == 2 and all(0.8 < peak <= 1.1 for peak in peaks), peaks
