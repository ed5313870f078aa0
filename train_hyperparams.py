"""Every setting of a training run, its default, and why.

`TrainConfig` is the one list: train.py makes its flags from it, a run stores it, and a script that
wants other defaults changes them here. Where no other reason is given, the value is the paper's
(Liu et al., "Content-Aware GAN Compression", CVPR 2021) or StyleGAN2's own.
"""

from dataclasses import dataclass

from Util.settings import Settings, setting, some_words


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of train.py; one flag each.

    Attributes:
        options: settings of distillation terms that have any, flags too.
    """

    # What is trained on what.
    path: str = setting(
        "", "training images: a folder, or an LMDB with keys like 256-00000", exists="folder"
    )
    size: int = setting(0, "image side in px; 0: as the checkpoint has it (64 without one)", low=0)
    ckpt: str = setting(
        "", "checkpoint to start from, e.g. a pruned one; empty: from scratch", exists="file"
    )
    teacher_ckpt: str = setting(
        "",
        "full-size checkpoint to distil from; empty or none: GAN loss only; with a pruned --ckpt,"
        " say none",
    )
    resume: str = setting(
        "",
        "go on with a run: its folder (newest checkpoint), or one of its checkpoints; auto: with"
        " that in --out if there is one, else start it",
    )
    load_train_state: bool = setting(
        False, "also take optimisers, iteration and random state from --ckpt"
    )
    out: str = setting("", "folder of this run; empty: runs/DATE-TIME, or that of --resume")
    recipe: str = setting(
        "",
        "settings of a paper, see below; what else is given wins. Empty: as the pruned checkpoint"
        " remembers; none: no recipe; list: print them",
        metavar="NAME",
    )
    discriminator: str = setting(
        "teacher",
        "where the discriminator starts: the checkpoint's (a pruned one has the teacher's), or from"
        " scratch",
        choices=("teacher", "scratch"),
    )

    # Networks made from scratch. Widths: StyleGAN2's pyramid unless given.
    channels: tuple[int, ...] = setting(
        (), "generator widths a,b,... (constant input, conv1, convs.0, ...); empty: full size"
    )
    channel_multiplier: int = setting(
        2, "width factor of the full size above 32 px; 1: StyleGAN2's small architecture", low=1
    )
    style_dim: int = setting(512, "size of z and w", low=1, aliases=("latent",))
    n_mlp: int = setting(8, "layers of the mapping network", low=1)

    # Length and batch. The paper: 450,001 iterations of 16 images at 256 px.
    iter: int = setting(450_000, "train up to this iteration", low=1)
    batch_size: int = setting(
        16, "images per iteration, over all processes", low=1, aliases=("batch",)
    )
    batch_gpu: int = setting(
        0,
        "images that pass through the networks at a time in each process, a multiple of 4; the"
        " gradients of a batch add up over such parts. 0: all, which takes the most memory",
        low=0,
    )
    resample: str = setting(
        "bilinear",
        "filter that resizes pictures of a folder; an LMDB has been resized by its own",
        choices=("bilinear", "lanczos", "box", "bicubic"),
    )
    max_bad: int = setting(10, "unreadable images that are named and passed over", low=0)
    mirror: bool = setting(True, "flip training images left to right at random (faces allow it)")

    # Optimiser. Betas (0, 0.99), adjusted for lazy regularisation as in StyleGAN2, appendix B.
    lr: float = setting(0.002, "learning rate of Adam", low=0)
    lr_decay: int = setting(
        0,
        "images at the end of the run over which the learning rates fall linearly to zero;"
        " 0: no decay, as published",
        low=0,
    )
    mixing: float = setting(0.9, "probability of mixing two styles in a batch", low=0, high=1)
    ema_decay: float = setting(
        0.5 ** (32 / 10_000),
        "decay of g_ema per iteration: half-life of 312 iterations",
        low=0,
        high=1,
    )

    # Regularisation. R1's 10 is the paper's, at 256 px; of small pictures less is enough, in
    # proportion to size**2 / batch (StyleGAN2-ADA).
    r1: float = setting(10.0, "weight of the R1 penalty", low=0)
    path_regularize: float = setting(2.0, "weight of the path length penalty; 0: off", low=0)
    path_batch_shrink: int = setting(2, "path length is computed on batch_size / this", low=1)
    d_reg_every: int = setting(16, "iterations between R1 penalties", low=1)
    g_reg_every: int = setting(4, "iterations between path length penalties", low=1)
    freeze_noise: bool = setting(
        False,
        "hold layer-noise strengths at what they are (0 from scratch): noise learned early in a"
        " small run stands in for details",
    )

    grad_clip: float = setting(
        0.0, "largest norm of a phase's gradients; 0: no clipping, as in StyleGAN2", low=0
    )

    gan_ramp: int = setting(
        0,
        "images over which the GAN loss in the generator's phase grows from nothing; 0: there from"
        " the start, as published",
        low=0,
    )

    # Distillation (paper, section 3.3).
    kd_l1_lambda: float = setting(3.0, "weight of the L1 distance to the teacher's images", low=0)
    kd_lpips_lambda: float = setting(
        3.0, "weight of the perceptual distance to the teacher's images", low=0
    )
    kd: tuple[str, ...] = setting(
        (),
        "further distillation terms and their weights, NAME=WEIGHT,...; see below",
        metavar="NAME=WEIGHT,...",
    )
    kd_mode: str = setting(
        "Output_Only",
        "compare the images, or the RGB sums of every resolution",
        choices=("Output_Only", "Intermediate"),
    )
    kd_shared_noise: bool = setting(
        False, "student and teacher see the same layer noise; the paper's draw theirs separately"
    )
    content_aware_KD: bool = setting(True, "distil only inside the teacher's content mask")
    parser_ckpt: str = setting(
        "",
        "parser that makes the mask: a file, or a name as prune.py has it; empty: the bundled one"
        " for the bundled teacher, else Model/parser_model/79999_iter.pth",
        aliases=("parser",),
        exists="parser",
    )
    content: tuple[str, ...] = setting(
        (),
        "classes that the mask holds, such as skin,hair,eyes or all,-background; empty: the"
        " parser's own, of faces all but background and cloth",
        metavar="CLASS,...",
        parse=some_words,
    )
    kd_soft_mask: bool = setting(
        False, "mask by the probability of the content; the paper's mask is 0 or 1"
    )
    perceptual: str = setting(
        "vgg",
        "perceptual network: vgg, alex, squeeze (LPIPS; weights are downloaded on first use), or"
        " parser (features of --parser_ckpt; no download)",
        choices=("vgg", "alex", "squeeze", "parser"),
    )
    perceptual_ckpt: str = setting(
        "",
        "torchvision weights of the LPIPS trunk (vgg16, alexnet or squeezenet1_1), no download",
        exists="file",
    )

    # Precision. float32 is what the paper trained in.
    amp: str = setting(
        "none",
        "precision of all networks: none (float32), bf16, or fp16 with scaled losses; path length"
        " stays in float32",
        choices=("none", "bf16", "fp16"),
    )
    tf32: bool = setting(
        False, "round the factors of float32 products to TensorFloat-32 (Ampere and newer GPUs)"
    )

    compile: bool = setting(
        False,
        "compile teacher, parser and perceptual network by torch.compile: minutes at the start, and"
        " results that differ by rounding",
    )
    cuda_graphs: bool = setting(
        False,
        "with --compile on a GPU: replay these networks as CUDA graphs, one launch instead of"
        " hundreds, which pays at few images a GPU and takes memory of its own",
    )

    # What is written, and when.
    fid_n_sample: int = setting(
        0,
        "images of g_ema for the Frechet distance before every checkpoint, the best of which stays"
        " as best.pt; 0: none. The paper's tables have 50,000",
        low=0,
    )
    fid_features: str = setting(
        "inception",
        "network whose features the metrics compare: inception (downloaded on first use), or parser"
        " (--parser_ckpt; no download)",
        choices=("inception", "parser"),
    )
    fid_metrics: tuple[str, ...] = setting(
        ("fid",),
        "metrics measured before each checkpoint, of fid,kid,pr; the first that is a distance"
        " chooses best.pt",
    )
    fid_stats: str = setting("", "statistics of the real images; empty: those of --path")
    fid_batch: int = setting(
        64, "images evaluated at a time in each process, fewer where they are large", low=1
    )
    inception_ckpt: str = setting("", "FID Inception weights, no download", exists="file")
    n_sample: int = setting(25, "images in a sample grid", low=1)
    val_sample_freq: int = setting(1000, "iterations between sample grids; 0: only the last", low=0)
    model_save_freq: int = setting(
        10_000, "iterations between checkpoints; 0: only the last", low=0
    )
    keep_checkpoints: int = setting(0, "newest checkpoints of the run that stay; 0: all", low=0)
    dry_run: bool = setting(
        False, "check everything, train two iterations, print speed and memory, keep nothing"
    )
    wandb: str = setting(
        "",
        "project of Weights & Biases that gets the log too (pip install wandb;"
        " WANDB_MODE=offline keeps it in the run's folder); empty: none",
        metavar="PROJECT",
    )
    log_freq: int = setting(50, "iterations between lines of metrics.jsonl", low=1)

    # Where it runs.
    device: str = setting("auto", "auto (a GPU if CUDA is there, else cpu), cpu, cuda:N")
    gpu_device_ids: tuple[int, ...] = setting(
        (0,),
        "GPUs of a run, by index among those that CUDA_VISIBLE_DEVICES leaves; several start one"
        " process on each",
    )
    primary_device: str = setting(
        "cuda:0", "the GPU that auto takes (default: the first of gpu_device_ids)"
    )
    dist_timeout: float = setting(
        600.0,
        "seconds after which several processes give up on one that does not answer; waiting for one"
        " that writes, measures or downloads does not count",
        above=0,
    )
    workers: int | None = setting(
        None,
        "data loading processes of each training process; 0: load in it (default: its share of the"
        " CPU cores, 4 at most)",
        low=0,
    )
    threads: int = setting(
        0,
        "CPU threads of PyTorch in each process; 0: OMP_NUM_THREADS, or as many as there are idle"
        " cores at the start. A resumed run keeps its number: the last bits depend on it",
        low=0,
    )
    seed: int = setting(0, "seed of networks, latents and data order, at least 0", low=0)
    options: tuple[Settings, ...] = ()

    @property
    def compile_mode(self) -> str:
        """Mode of torch.compile for the frozen networks; "" leaves them as they are."""
        if not self.compile:
            return ""
        return "reduce-overhead" if self.cuda_graphs else "default"

    def path_batch(self, images: int) -> int:
        """Give the images of a batch that path length is computed on, at least one."""
        return max(1, images // self.path_batch_shrink)

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher to distil from."""
        return self.teacher_ckpt not in ("", "none")
