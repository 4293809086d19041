"""The sections of a configuration: every official key with its official name and default.

Nothing is read, checked or built here; config.py does that. Annotations are typing's own generics, because pyrallis
understands no other ones (and no `from __future__ import annotations`).
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Union


def _default(value: Any) -> Any:
    """A dataclass field whose default is a fresh copy of a list or dict."""
    return field(default_factory=value.copy)


@dataclass
class DataConfig:
    """Training images and captions."""

    data_dir: List[Optional[str]] = _default([])  # folders or tar lists
    caption_proportion: Dict[str, int] = _default({"prompt": 1})
    external_caption_suffixes: List[str] = _default([])  # of the JSON files with more captions
    external_clipscore_suffixes: List[str] = _default([])  # of the JSON files with the captions' CLIP scores
    clip_thr_temperature: float = 1.0  # of the softmax over CLIP scores; lower prefers the best caption
    clip_thr: float = 0.0  # captions below this CLIP score are not used
    del_img_clip_thr: float = 0.0
    sort_dataset: bool = False
    load_text_feat: bool = False  # precomputed text features instead of captions
    load_vae_feat: bool = False  # precomputed latents instead of images
    transform: str = "default_train"
    type: str = "SanaWebDatasetMS"  # data set class
    image_size: int = 512  # pixels
    hq_only: bool = False
    valid_num: int = 0
    data: Any = None
    extra: Any = None


@dataclass
class ModelConfig:
    """The transformer, its precision, and where its weights come from."""

    model: str = "SanaMS_600M_P1_D28"  # registered name
    teacher: Optional[str] = None
    image_size: int = 512  # pixels; the latent grid is image_size / vae.vae_downsample_rate
    mixed_precision: str = "fp16"  # fp16, bf16 or fp32
    fp32_attention: bool = True  # linear attention computes in float32
    load_from: Optional[str] = None  # weights to start from: path, URL or hf://
    discriminator_model: Optional[str] = None
    teacher_model: Optional[str] = None  # weights of the distillation teacher
    teacher_model_weight_dtype: Optional[str] = None
    resume_from: Optional[Union[Dict[str, Any], str]] = _default(
        {"checkpoint": None, "load_ema": False, "resume_lr_scheduler": True, "resume_optimizer": True}
    )
    aspect_ratio_type: str = "ASPECT_RATIO_1024"  # table of image sizes
    multi_scale: bool = True  # several aspect ratios
    pe_interpolation: float = 1.0  # position embeddings are stretched by this factor
    micro_condition: bool = False
    attn_type: str = "linear"  # self-attention
    autocast_linear_attn: bool = False
    ffn_type: str = "glumbconv"
    mlp_acts: List[Optional[str]] = _default(["silu", "silu", None])  # of the three convolutions
    mlp_ratio: float = 2.5  # width of the feed-forward part / hidden size
    use_pe: bool = False  # a position embedding is added
    pos_embed_type: str = "sincos"
    qk_norm: bool = False  # self-attention normalises queries and keys
    class_dropout_prob: float = 0.0  # captions replaced by the learned null caption in training
    linear_head_dim: int = 32  # width of a linear attention head
    cross_norm: bool = False  # cross-attention normalises queries and keys
    cross_attn_type: str = "flash"
    logvar: bool = False  # a head predicts the log variance of the loss (Sprint)
    cfg_scale: int = 4
    cfg_embed: bool = False  # the guidance scale is an input (Sprint)
    cfg_embed_scale: float = 1.0
    guidance_type: str = "classifier-free"
    pag_applied_layers: List[int] = _default([8])  # blocks perturbed by PAG
    ladd_multi_scale: bool = True
    head_block_ids: Optional[List[int]] = None  # blocks that feed the discriminator heads
    extra: Any = None


@dataclass
class AEConfig:
    """The autoencoder."""

    vae_type: str = "AutoencoderDC"  # registered name
    vae_pretrained: str = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"  # folder or hub id
    weight_dtype: str = "float32"
    scale_factor: float = 0.41407
    vae_latent_dim: int = 32  # channels
    vae_downsample_rate: int = 32  # image pixels per latent pixel, along one side
    sample_posterior: bool = True
    extra: Any = None


@dataclass
class TextEncoderConfig:
    """The text encoder and the complex human instruction (CHI)."""

    text_encoder_name: str = "gemma-2-2b-it"  # official name, hub id or folder
    caption_channels: int = 2304  # width of a text token
    y_norm: bool = True  # text tokens are normalised before cross-attention
    y_norm_scale_factor: float = 1.0  # initial weight of that norm
    model_max_length: int = 300  # text tokens the transformer sees
    chi_prompt: List[Optional[str]] = _default([])  # instruction lines put before the prompt; none: no CHI
    extra: Any = None


@dataclass
class SchedulerConfig:
    """The noise process in training and the sampler."""

    train_sampling_steps: int = 1000  # timesteps run over [0, this]
    predict_flow_v: bool = True  # the model predicts the velocity noise - latents
    noise_schedule: str = "linear_flow"
    pred_sigma: bool = False  # the model predicts a variance too
    learn_sigma: bool = True  # takes effect together with pred_sigma
    vis_sampler: str = "flow_dpm-solver"  # registered name
    flow_shift: float = 1.0  # shifts sigma towards noise: s * sigma / (1 + (s - 1) * sigma)
    weighting_scheme: Optional[str] = "logit_normal"  # density of training timesteps
    weighting_scheme_discriminator: Optional[str] = "logit_normal_trigflow"
    add_noise_timesteps: List[float] = _default([1.57080])  # TrigFlow times in [0, pi/2]
    logit_mean: float = 0.0
    logit_std: float = 1.0
    logit_mean_discriminator: float = 0.0
    logit_std_discriminator: float = 1.0
    sigma_data: float = 0.5  # standard deviation of latents in TrigFlow
    timestep_norm_scale_factor: float = 1.0  # timesteps are divided by this before embedding
    extra: Any = None


VALIDATION_PROMPTS = [
    "dog",
    "portrait photo of a girl, photograph, highly detailed face, depth of field",
    "Self-portrait oil painting, a beautiful cyborg with golden hair, 8k",
    "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k",
    "A photo of beautiful mountain with realistic sunset and blue lake, highly detailed, masterpiece",
]
OPTIMIZER = {"eps": 1.0e-10, "lr": 1.0e-4, "type": "AdamW", "weight_decay": 0.03}


@dataclass
class TrainingConfig:
    """The training run."""

    num_workers: int = 4
    seed: int = 42
    train_batch_size: int = 32  # images per process and micro-batch
    num_epochs: int = 100
    gradient_accumulation_steps: int = 1
    grad_checkpointing: bool = False
    gradient_clip: float = 1.0  # greatest gradient norm
    gc_step: int = 1
    optimizer: Dict[str, Any] = _default(OPTIMIZER)  # type, lr and the optimizer's own arguments
    optimizer_D: Dict[str, Any] = _default(OPTIMIZER)  # of the discriminator
    load_from_optimizer: bool = False
    load_from_lr_scheduler: bool = False
    resume_lr_scheduler: bool = True
    lr_schedule: str = "constant"
    lr_schedule_args: Dict[str, int] = _default({"num_warmup_steps": 500})
    auto_lr: Dict[str, str] = _default({"rule": "sqrt"})  # scales lr with the batch size
    eval_batch_size: int = 16
    use_fsdp: bool = False
    use_flash_attn: bool = False
    eval_sampling_steps: int = 250  # training steps between two validations
    lora_rank: int = 4
    log_interval: int = 50  # training steps
    mask_type: str = "null"
    mask_loss_coef: float = 0.0
    load_mask_index: bool = False
    snr_loss: bool = False
    real_prompt_ratio: float = 1.0
    early_stop_hours: float = 10000.0  # hours
    save_image_epochs: int = 1
    save_model_epochs: int = 1
    save_model_steps: int = 1000000
    visualize: bool = False  # validation pictures are made
    null_embed_root: str = "output/pretrained_models/"
    valid_prompt_embed_root: str = "output/tmp_embed/"
    validation_prompts: List[str] = _default(VALIDATION_PROMPTS)
    local_save_vis: bool = False  # validation pictures are saved as files
    deterministic_validation: bool = True
    online_metric: bool = False
    eval_metric_step: int = 5000
    online_metric_dir: str = "metric_helper"
    work_dir: str = "/cache/exps/"
    skip_step: int = 0
    loss_type: str = "huber"
    huber_c: float = 0.001
    num_ddim_timesteps: int = 50
    ema_decay: float = 0.95
    debug_nan: bool = False
    ema_update: bool = False  # an exponential moving average of the weights is kept
    ema_rate: float = 0.9999
    tangent_warmup_steps: int = 10000
    scm_cfg_scale: Union[float, List[float]] = _default([1.0])
    cfg_interval: Optional[List[float]] = None  # two TrigFlow times
    scm_logvar_loss: bool = True
    norm_invariant_to_spatial_dim: bool = True
    norm_same_as_512_scale: bool = False
    g_norm_constant: float = 0.1
    g_norm_r: float = 1.0
    show_gradient: bool = False
    lr_scale: Optional[Dict[str, List[str]]] = None
    adv_lambda: float = 1.0
    scm_loss: bool = True
    scm_lambda: float = 1.0
    loss_scale: float = 1.0
    r1_penalty: bool = False
    r1_penalty_weight: float = 1.0e-5
    diff_timesteps_D: bool = True
    suffix_checkpoints: Optional[str] = "disc"
    misaligned_pairs_D: bool = False
    discriminator_loss: str = "cross entropy"
    largest_timestep: float = 1.57080  # TrigFlow time
    train_largest_timestep: bool = False
    largest_timestep_prob: float = 0.5
    extra: Any = None


@dataclass
class ControlNetConfig:
    """The ControlNet's control signal."""

    control_signal_type: str = "scribble"
    validation_scribble_maps: List[str] = _default(
        [
            f"output/tmp_embed/controlnet/{name}_scribble_thickness_3.jpg"
            for name in ("dog", "girl", "cyborg", "Astronaut", "mountain")
        ]
    )


@dataclass
class ModelGrowthConfig:
    """How a deeper model starts from a shallower one's weights."""

    pretrained_ckpt_path: str = ""
    init_strategy: str = "constant"
    init_params: Dict[str, Any] = _default({"expand_ratio": 3, "noise_scale": 0.01})
    source_num_layers: int = 20
    target_num_layers: int = 60


@dataclass
class SanaConfig:
    """One YAML file."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    vae: AEConfig = field(default_factory=AEConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    controlnet: Optional[ControlNetConfig] = None
    model_growth: Optional[ModelGrowthConfig] = None
    work_dir: str = "output/"
    resume_from: Optional[str] = None
    load_from: Optional[str] = None
    debug: bool = False
    caching: bool = False
    report_to: str = "wandb"
    tracker_project_name: str = "sana-baseline"
    name: str = "baseline"
    loss_report_name: str = "loss"
