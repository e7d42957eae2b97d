"""Small models of diffusers."""

import copy
from typing import Any

import diffusers
from torch import nn

from leedl_fast.integrations.diffusers import changes

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}


def unet() -> nn.Module:
    return diffusers.UNet2DModel(
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **SMALL,
    )


def conditional_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **SMALL,
    )


def conditional_unet_of_one_block() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        **SMALL | {"block_out_channels": (8,)},
    )


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        **SMALL,
    )


def transformer() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, in_channels=4
    )


def transformer_behind_the_dispatcher() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )


def patched(model: nn.Module) -> nn.Module:
    """A copy with all that `changes` says, which is some."""
    model = copy.deepcopy(model)
    found = list(changes(model))
    assert found
    assert all(change.now and not change.reason for change in found)
    for change in found:
        change.apply(model.get_submodule(change.path))
    return model
