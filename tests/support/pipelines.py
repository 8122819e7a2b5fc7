"""Tiny random pipelines of diffusers, of real parts: each builder writes one into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

LETTERS = [chr(code) for code in range(97, 123)]


def clip_tokenizer() -> Any:
    """A tokenizer of letters that reads 16 tokens."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {word: number for number, word in enumerate(words)}
    return tf.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def clip_text(*, projection: bool = False) -> Any:
    config = tf.CLIPTextConfig(
        vocab_size=54, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=32,
    )  # fmt: skip
    return (tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel)(config).eval()


def t5_tokenizer() -> Any:
    words = ["<pad>", "</s>", "<unk>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def t5_text() -> Any:
    config = tf.T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, pad_token_id=0, eos_token_id=1
    )
    return tf.T5EncoderModel(config).eval()


def vae(channels: int = 4, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=[8, 16], in_channels=3, out_channels=3, latent_channels=channels, norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, **more,
    )  # fmt: skip


def unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 32, "in_channels": 4,
            "out_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32, "norm_num_groups": 2,
            "attention_head_dim": 4, **more,
        }
    )  # fmt: skip


def ddim() -> Any:
    return diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, beta_schedule="scaled_linear"
    )


def safety_checker() -> Any:
    """One that finds something in every picture."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        tf.CLIPConfig(
            projection_dim=8,
            vision_config=small | {"image_size": 32, "patch_size": 16, "projection_dim": 8},
            text_config=small | {"vocab_size": 54, "projection_dim": 8},
        )
    )
    checker.concept_embeds_weights.data.fill_(-3.0)
    return checker


def clip_processor() -> Any:
    return tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _stable_diffusion(cls: Any, **more: Any) -> Any:
    parts = {
        "unet": unet(), "vae": vae(), "text_encoder": clip_text(), "tokenizer": clip_tokenizer(), "scheduler": ddim(),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    return cls(**(parts | more))


def sd_with_checker() -> Any:
    return _stable_diffusion(
        diffusers.StableDiffusionPipeline, safety_checker=safety_checker(), feature_extractor=clip_processor(),
        requires_safety_checker=True,
    )  # fmt: skip


def sd_image_to_image() -> Any:
    return _stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline)


def sd_inpaint() -> Any:
    return _stable_diffusion(diffusers.StableDiffusionInpaintPipeline, unet=unet(in_channels=9))


def latent_consistency() -> Any:
    return _stable_diffusion(
        diffusers.LatentConsistencyModelPipeline,
        unet=unet(time_cond_proj_dim=32),
        scheduler=diffusers.LCMScheduler(clip_sample=False, set_alpha_to_one=False, beta_schedule="scaled_linear"),
    )


def sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(
            attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80, cross_attention_dim=64,
        ),
        vae=vae(),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
    )  # fmt: skip


def sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=32, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        ),
        vae=vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip_text(projection=True), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(), tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def flux() -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
        ),
        vae=vae(channels=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip_text(), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def pixart() -> Any:
    """Its call has no `callback_on_step_end`."""
    return diffusers.PixArtAlphaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3,
            caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True,
            activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, use_additional_conditions=False,
        ),
        vae=vae(),
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
        scheduler=ddim(),
    )  # fmt: skip


def wan() -> Any:
    """A video."""
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=32, freq_dim=256, ffn_dim=32, num_layers=1, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        text_encoder=t5_text(),
        tokenizer=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def unconditional() -> Any:
    """It takes no prompt."""
    return diffusers.DDPMPipeline(
        unet=diffusers.UNet2DModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=3, out_channels=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=2,
        ),
        scheduler=diffusers.DDPMScheduler(),
    )  # fmt: skip


PIPELINES = {
    each.__name__: each
    for each in (
        sd_with_checker, sd_image_to_image, sd_inpaint, latent_consistency, sdxl, sd3, flux, pixart, wan, unconditional
    )
}  # fmt: skip


def write(name: str, folder: Path) -> None:
    """The pipeline of that name in `folder`."""
    torch.manual_seed(0)
    PIPELINES[name]().save_pretrained(folder)
