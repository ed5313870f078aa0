"""Distillation from the full-size teacher inside the content of interest (paper, section 3.3).

`TERMS` lists what a student can be compared by; `make_terms` builds those that a run asks for.
"""

import math
from dataclasses import replace

from Compression.distillation import (
    high_band,
    moments,
    perceptual,
    pixels,
    relation,
    teacher_discriminator,
)
from Compression.distillation.terms import Parts, Pass, Sources, Term, TermKind
from train_hyperparams import TrainConfig
from Util.settings import SettingError, chosen

__all__ = ["TERMS", "Parts", "Pass", "Sources", "Term", "TermKind", "make_terms", "weights"]

TERMS = {
    "l1": TermKind(pixels.make, "absolute difference of the pictures"),
    "perceptual": TermKind(
        perceptual.make, "LPIPS, or a distance of parser features (--perceptual)", perceptual.label
    ),
    "relation": TermKind(
        relation.make,
        "relations between latents and their neighbours (StyleKD)",
        options=relation.RelationSettings,
        features=True,
        whole_batch=True,
    ),
    "moments": TermKind(
        moments.make,
        "moments of features against the teacher's (DiME)",
        moments.label,
        moments.MomentsSettings,
        whole_batch=True,
    ),
    "high_band": TermKind(
        high_band.make,
        "the discriminator's high-frequency features against the teacher's (NICKEL)",
        options=high_band.HighBandSettings,
    ),
    "teacher_discriminator": TermKind(
        teacher_discriminator.make, "a second discriminator that starts as the teacher's (DiME)"
    ),
}


def weights(config: TrainConfig) -> dict[str, float]:
    """Weight of every term of a run that is not 0, by its name in the table.

    Raises:
        SettingError: an unknown term, or a weight that is no number of at least 0.
    """
    found = {"l1": config.kd_l1_lambda, "perceptual": config.kd_lpips_lambda}
    for text in config.kd:
        name, equals, weight = text.partition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            equals = ""
        if not equals or not 0 <= found[name] < math.inf:
            raise SettingError("kd", f"{text}: expected NAME=WEIGHT with a weight of at least 0")
        if name not in TERMS:
            raise SettingError("kd", f"{text}: unknown term; there are {', '.join(TERMS)}")
    return {name: weight for name, weight in found.items() if weight}


def make_terms(sources: Sources) -> list[Term]:
    """The terms of a run, with what they need loaded.

    Raises:
        SettingError: a setting of a term cannot be used.
    """
    terms = []
    for name, weight in weights(sources.config).items():
        kind = TERMS[name]
        options = chosen(sources.config.options, kind.options)
        made = kind.make(replace(sources, options=options))
        label = kind.label(options or sources.config) if kind.label else name
        terms.append(Term(label, weight, made, kind.features))
    return terms
