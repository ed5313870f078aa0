"""The networks of a run, its teacher and its optimisers: loaded, new, or taken up again.

pruned checkpoint + teacher -> g, g_ema, d
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from Compression import distillation
from Compression.content import ContentParser, parser_for
from Compression.parsers import ClassMapParser
from Compression.training import Teacher, Trainer
from Evaluation.settings import check_size
from Model import checkpoint
from Model.discriminator import Discriminator
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util import distributed
from Util.compiling import compile_method
from Util.run_log import measured, newest_checkpoint
from Util.settings import SettingError, blame
from Util.streams import stream


def make_trainer(
    config: TrainConfig, device: torch.device, announce: Callable[[str], None]
) -> tuple[Trainer, dict[str, Any], ContentParser | None]:
    """Build networks, teacher and optimisers, and take up a saved state if asked.

    Returns:
        The trainer, what the checkpoint remembers of its making, and what makes the masks.
    """
    source, resume = distributed.from_first(_start(config))
    torch.manual_seed(config.seed)
    named = "resume" if config.resume and resume else "ckpt" if source else "size and --channels:"
    with blame(named):
        content = checkpoint.read(source) if source else {}
        _check_teacher(config, source, content)
        generator, g_ema = _make_networks(config, content, source)
        discriminator = _make_discriminator(config, content, generator, resume, source)
        _check_fit(generator, g_ema, discriminator, source)
    full = _load_teacher(config, generator, device)
    _announce_path_batch(config, announce)
    parser = _make_parser(config, device, announce)
    if parser:
        _compare_content(source, content, parser, announce)
    teacher = _make_teacher(config, full, discriminator, device, parser)
    trainer = Trainer(generator, discriminator, config, device, teacher, g_ema)
    if distributed.world_size() > 1:
        torch.manual_seed(config.seed * distributed.world_size() + distributed.rank() + 1)
    if resume:
        name = Path(source).stem
        iteration = int(name) if name.isdecimal() else None
        with blame(f"{named} {source}:"):
            trainer.load_state(content, iteration)
        if "train_state" not in content:
            announce(
                f"{source}: written by the original code; going on at iteration {iteration}, as its"
                " name says, with the mean path length at 0 and new random streams"
            )
        else:
            _renew_streams(config, trainer, len(content["train_state"]["rng"]), announce)
    distributed.meet()  # one that downloads takes its time
    distributed.broadcast(weights(trainer).values())
    origin = content.get("config")
    return trainer, dict(origin) if isinstance(origin, Mapping) else {}, parser


def _start(config: TrainConfig) -> tuple[str, bool]:
    """The checkpoint to start from, or empty, and whether that is to go on with its training."""
    if config.resume:
        file = Path(config.resume)
        if newest := file if file.is_file() else newest_checkpoint(file):
            return str(newest), True
        # A run that was ended before its first checkpoint starts again as it did.
    return config.ckpt, config.load_train_state


def reached(config: TrainConfig) -> int:
    """Give the iteration of the checkpoint to go on from if nothing is left to do, else 0."""
    source, resume = _start(config)
    name = Path(source).stem
    iteration = int(name) if resume and name.isdecimal() else 0
    if iteration < config.iter or config.dry_run:
        return 0
    left = config.resume and config.fid_n_sample and not measured(config.out, iteration)
    return 0 if left else iteration


def _make_networks(
    config: TrainConfig, content: Mapping[str, Any], source: str
) -> tuple[Generator, Generator | None]:
    """Generator and its moving average if there is one, loaded or new."""
    if not content:
        size, widths = config.size or 64, (config.channels, config.channel_multiplier)
        return Generator(size, config.style_dim, config.n_mlp, *widths), None
    g_ema = checkpoint.load_generator(content, name=source) if "g_ema" in content else None
    key = "g" if "g" in content else "g_ema"
    generator = checkpoint.load_generator(content, key, name=source)
    check_size("size", config.size, source, generator)
    return generator, g_ema


def _make_discriminator(
    config: TrainConfig,
    content: Mapping[str, Any],
    generator: Generator,
    resume: bool,
    source: str,
) -> Discriminator:
    """The checkpoint's, the teacher's where it has none, or a new one of their widths."""
    if not content:
        # As wide as the generator's last convolution at each resolution.
        return Discriminator(generator.size, channels=generator.channels[1::2])
    scratch = config.discriminator == "scratch" and not resume
    if "d" not in content and config.has_teacher:
        with blame("teacher_ckpt"):
            content = checkpoint.read(config.teacher_ckpt)
            if scratch and "d" not in content:
                full = checkpoint.load_generator(content, name=config.teacher_ckpt)
                return Discriminator(generator.size, channels=full.channels[1::2])
    if scratch and "d" not in content:
        return Discriminator(generator.size, config.channel_multiplier)
    if "d" not in content:
        also = f", nor does {config.teacher_ckpt}" if config.has_teacher else ""
        raise SettingError(
            "discriminator",
            f"{config.discriminator}: {source} holds none (d){also}; give a teacher_ckpt that has"
            " one, or train with discriminator scratch",
        )
    found = checkpoint.load_discriminator(content, name=source)
    return Discriminator(found.size, channels=found.channels) if scratch else found


def _make_parser(
    config: TrainConfig, device: torch.device, announce: Callable[[str], None]
) -> ContentParser | None:
    """What makes the teacher's mask, or None where nothing is masked."""
    if not (config.has_teacher and config.content_aware_KD):
        if config.content:
            announce(f"the content {','.join(config.content)} is not used: nothing is masked")
        return None
    parser = parser_for(config.parser_ckpt, config.teacher_ckpt, device, config.content)
    soft = config.kd_soft_mask or not isinstance(parser.network, ClassMapParser)
    compile_method(parser.network, "classify" if soft else "class_map", config.compile_mode)
    return parser


def _check_fit(
    generator: Generator, g_ema: Generator | None, discriminator: Discriminator, source: str
) -> None:
    """Refuse networks that cannot be trained together."""
    if discriminator.size != generator.size:
        raise ValueError(
            f"{source}: its generator makes {generator.size} px images, and the discriminator takes"
            f" {discriminator.size} px; give a file whose networks belong together"
        )
    shapes = [[p.shape for p in each.parameters()] for each in (generator, g_ema or generator)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{source}: g and g_ema are no two states of one network; give a file in which they are"
        )


def _announce_path_batch(config: TrainConfig, announce: Callable[[str], None]) -> None:
    """Say where processes whose share is no multiple change the path length's batch."""
    processes = distributed.world_size()
    share, wanted = config.batch_size // processes, config.path_batch(config.batch_size)
    found = processes * config.path_batch(share)
    if config.path_regularize and found != wanted:
        announce(
            f"path length is computed on {found} images, not on {wanted}: each of {processes}"
            f" processes has {share}; let batch_size be a multiple of"
            f" {processes * config.path_batch_shrink}"
        )


def _load_teacher(
    config: TrainConfig, student: Generator, device: torch.device
) -> Generator | None:
    """The frozen full-size generator, or None without a teacher."""
    if not config.has_teacher:
        return None
    with blame("teacher_ckpt"):
        generator = checkpoint.load_generator(config.teacher_ckpt, device=device, size=student.size)
    if generator.style_dim != student.style_dim:
        raise SettingError(
            "teacher_ckpt",
            f"{config.teacher_ckpt} has latents of {generator.style_dim} numbers, the student of"
            f" {student.style_dim}, and both get the same; name the teacher that it was pruned from"
            + (
                "" if config.ckpt or config.resume else f", or give style_dim {generator.style_dim}"
            ),
        )
    compile_method(generator, "synthesis", config.compile_mode)
    return generator.eval().requires_grad_(False)


def _make_teacher(
    config: TrainConfig,
    generator: Generator | None,
    discriminator: Discriminator,
    device: torch.device,
    parser: ContentParser | None,
) -> Teacher | None:
    """The full-size generator with its mask and the terms, or None without a teacher."""
    if generator is None:
        return None
    mask = parser.soft if parser and config.kd_soft_mask else parser
    sources = distillation.Sources(config, generator, device, discriminator)
    return Teacher(generator, mask, distillation.make_terms(sources))


def _check_teacher(config: TrainConfig, source: str, content: Mapping[str, Any]) -> None:
    """Ask for the teacher of a checkpoint that says it was pruned."""
    made = content.get("config")
    if isinstance(made, Mapping) and "channels_after" in made and not config.teacher_ckpt:
        raise SettingError(
            "teacher_ckpt",
            f"is missing; {source} was pruned and learns from its full-size teacher"
            f" ({made.get('source', 'unknown')}): name it, or none for the GAN losses alone",
        )


def _compare_content(
    source: str,
    content: Mapping[str, Any],
    parser: ContentParser,
    announce: Callable[[str], None],
) -> None:
    """Tell that a checkpoint was pruned for another content than it is trained for."""
    made = content.get("config")
    pruned_for = made.get("content") if isinstance(made, Mapping) else None
    if isinstance(pruned_for, str) and pruned_for and pruned_for != parser.content:
        announce(
            f"{source} was pruned for {pruned_for}, and learns {parser.content} from its teacher;"
            " set content to train for what it was pruned for"
        )


def _renew_streams(
    config: TrainConfig, trainer: Trainer, before: int, announce: Callable[[str], None]
) -> None:
    """Start random streams that have not been used yet if the number of processes has changed."""
    now, rank = distributed.world_size(), distributed.rank()
    if before == now:
        return
    numbers = (config.seed, trainer.iteration, now, rank)
    torch.manual_seed(stream(*numbers).initial_seed())
    announce(f"processes: {before} until now, {now} from here on, with new random streams")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Give all tensors of the networks that are trained, which the processes hold in common."""
    networks = {"g": trainer.generator, "g_ema": trainer.g_ema, "d": trainer.discriminator}
    networks |= {name: network for name, (network, _) in trainer.further.items()}
    states = ((name, network.state_dict()) for name, network in networks.items())
    return {f"{name}.{key}": value for name, state in states for key, value in state.items()}
