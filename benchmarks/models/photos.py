"""Two more trained generators: 24x24 crops of two photographs, for figures of quality.

    data        scikit-learn's sample photographs; label 0 china.jpg, label 1 flower.jpg
    crop        a square of log-uniform side in [48, 192] pixels at a uniform place, to 24x24
    networks    stock DiTTransformer2DModel: 36 tokens (patches of 4x4), 3 blocks of width 192
                stock UNet2DModel: 24 -> 12 -> 6, widths 32, 64 and 96, attention at 6x6
    features    phi(x) [n, 54], for a Frechet distance: with y = C x the three opponent colours and
                W its orthonormal Haar transform over three levels, 24 -> 12 -> 6 -> 3,
                  27 = mean |W| over positions, per colour, level and orientation
                  27 = the coarsest level itself, 3x3 per colour
                each over its standard deviation among the reference crops

x  [B, 3, 24, 24] fp32 in [-1, 1]; parametrisation, schedulers and pipeline are those of the digits
(fewstep.assets.digits). The digits are strokes on a flat ground, these are textures, edges and
colours: errors that one model hides show in the other.

Why these features: they are fixed formulas, so that nothing has to be trained, shipped and trusted
with them, and a two-class classifier would look at little but colour. Blur, noise and wrong colours
move them at once; how edges join over long distances they do not see.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import Tensor

from fewstep.assets.digits import DigitsPipeline
from fewstep.metrics import frechet_distance

PHOTOS_PATH = Path(__file__).parent / "photos"
SIZE = 24
NUM_CLASSES = 2
SIDES = (48, 192)
# Crops of each split and its seed: the places are drawn anew, from the same photographs.
SPLITS = {"train": (16384, 0), "reference": (8192, 1)}
_OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])


def _crops(count: int, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(photo.copy()) for photo in load_sample_images().images]
    photos = [photo.permute(2, 0, 1).float() / 127.5 - 1 for photo in photos]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % NUM_CLASSES
    draws = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    images = torch.empty(count, 3, SIZE, SIZE)
    for image, label, (scale, top, left) in zip(images, labels, draws.tolist(), strict=True):
        photo = photos[label]
        side = round(SIDES[0] * (SIDES[1] / SIDES[0]) ** scale)
        top = int(top * (photo.shape[1] - side + 1))
        left = int(left * (photo.shape[2] - side + 1))
        crop = photo[None, :, top : top + side, left : left + side]
        image.copy_(
            torch.nn.functional.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True)[0]
        )
    return images.clamp(-1, 1), labels


@lru_cache(maxsize=2)
def _split(name: str) -> tuple[Tensor, Tensor]:
    return _crops(*SPLITS[name])


def photos_data(split: Literal["train", "reference"] = "train") -> tuple[Tensor, Tensor]:
    """(images [N, 3, 24, 24] fp32 in [-1, 1], labels [N]); labels alternate."""
    if split not in SPLITS:
        raise ValueError(f"split: expected 'train' or 'reference', got {split!r}")
    return _split(split)


def photos_transformer(*, heads: int = 6, layers: int = 3) -> DiTTransformer2DModel:
    """The untrained network, in eval mode; train it so too (`digits_transformer` says why)."""
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=3,
        num_layers=layers,
        sample_size=SIZE,
        patch_size=4,
        num_embeds_ada_norm=NUM_CLASSES,
    ).eval()


def photos_unet(*, widths: tuple[int, ...] = (32, 64, 96)) -> UNet2DModel:
    """The untrained UNet, in eval mode; its last label means "no label"."""
    plain = len(widths) - 1
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        norm_num_groups=16,
        attention_head_dim=32,
        num_class_embeds=NUM_CLASSES + 1,
    ).eval()


def load_photos_pipeline(name: Literal["teacher", "unet"] = "teacher") -> DigitsPipeline:
    """The trained pipeline, a DiT's or a UNet's, in fp32 on the CPU: 50 steps, no guidance."""
    if name not in ("teacher", "unet"):
        raise ValueError(f"name: expected 'teacher' (the DiT) or 'unet', got {name!r}")
    return DigitsPipeline.from_pretrained(
        PHOTOS_PATH / name, dtype=torch.float32, local_files_only=True
    )


def _haar(x: Tensor) -> tuple[Tensor, Tensor]:
    """One level: [n, c, 2h, 2w] -> means [n, c, h, w] and details [n, c, 3, h, w], orthonormal."""
    a, b = x[..., 0::2, :], x[..., 1::2, :]
    low, high = (a + b) / 2**0.5, (a - b) / 2**0.5
    parts = [(p[..., 0::2], p[..., 1::2]) for p in (low, high)]
    (ll, lh), (hl, hh) = [((a + b) / 2**0.5, (a - b) / 2**0.5) for a, b in parts]
    return ll, torch.stack([lh, hl, hh], 2)


def wavelet_features(images: Tensor) -> Tensor:
    """[n, 3, 24, 24] in [-1, 1] -> [n, 54] fp64, not yet standardised (module header)."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
        raise ValueError(f"images: expected shape [n, 3, 24, 24], got {tuple(images.shape)}")
    colours = torch.nn.functional.normalize(_OPPONENT.double(), dim=1)
    coarse = torch.einsum("dc,nchw->ndhw", colours, images.detach().cpu().double().clamp(-1, 1))
    features = []
    for _ in range(3):
        coarse, details = _haar(coarse)
        features.append(details.abs().mean((-1, -2)).flatten(1))
    return torch.cat([*features, coarse.flatten(1)], 1)


@lru_cache(maxsize=1)
def _reference() -> tuple[Tensor, Tensor]:
    features = wavelet_features(photos_data("reference")[0])
    spread = features.std(0)
    return features / spread, spread


def photo_features(images: Tensor) -> Tensor:
    """phi of the module's header, [n, 54] fp64, of images [n, 3, 24, 24]."""
    return wavelet_features(images) / _reference()[1]


def reference_features() -> Tensor:
    """phi of the reference crops, [8192, 54]."""
    return _reference()[0]


def frechet_distance_to_photos(images: Tensor) -> float:
    """Frechet distance of images [n, 3, 24, 24] to the reference crops. Compare equal n only."""
    return frechet_distance(photo_features(images), reference_features())
