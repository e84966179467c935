"""The two YAML files, as frozen models that are checked before anything starts.

`server.yaml` is read into :class:`ServerConfig`, `silo.yaml` into :class:`SiloConfig`. Field descriptions are
the text of docs/configuration.md (`python -m fedpft.config` prints it), so that the two cannot drift apart.
"""

import difflib
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from fedpft.errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]
LARGEST = 1_000_000_000  # of any number of things, or of seconds
MOST_THREADS = 1024
MOST_SILOS = 64  # of a round with secure aggregation, in which each has something to do for each other
MOST_SIMULATED = 10_000  # of one that is only rehearsed, to see for how many silos silo_privacy is of use
WORD_BITS = 32  # of what is summed then
MOST_NOISE = 50.0  # z of differential privacy: beyond it nothing is learned
NOISE_TAIL = 12.0  # deviations that a value's noise passes with probability 2 exp(-72) < 2e-31, whatever z is
MOST_ROUNDED = 1 << 16  # steps: norm of what is rounded off 2^32 values, more than any adapter has
Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^:\s]+):\d{1,5}$")]
SILO_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}$"  # fit for a certificate's common name and for a file's name
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Hold = Literal["auto", "memory", "disk"]
FewBits = Literal["int8", "int4"]
Weights = Literal["full"] | FewBits
TaskName = Literal[
    "sequence-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
    "image-classification",
    "causal-lm",
]
BadRows = Literal["refuse", "skip"]
Schedule = Literal["linear", "cosine", "constant"]
SharedMetric = Literal[
    "train_loss", "seconds", "tokens", "skipped_rows", "cut_texts", "cut_completions", "label_diversity"
]


class Section(BaseModel):
    """A YAML mapping whose keys are all known; it cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _within_reason(cls, value: Any, info: ValidationInfo) -> Any:
        """What Python can read, but torch, a clock or a file system could not use later."""
        name = str(info.field_name)
        if name != "seed" and (type(value) is int or name.endswith("_seconds")) and value and value > LARGEST:
            raise ValueError(f"must be at most {LARGEST}")
        if isinstance(value, Path) and "\0" in str(value):
            raise ValueError("holds a NUL, which no path can")
        return value


def _check_encoding(encoding: str | None) -> str | None:
    if encoding is not None:
        try:
            b"a".decode(encoding, "replace")  # which some codecs cannot do that are for other things than files
        except (LookupError, UnicodeError):
            raise ValueError(f"{encoding!r} is no text encoding; Python's names are meant, such as cp1252") from None
    return encoding


class ModelSection(Section):
    """The foundation model (FM). Only the server has this section."""

    path: Path = Field(
        description="Directory of the FM as `transformers` saves it: config.json, safetensors, tokenizer."
    )
    task: TaskName = Field("sequence-classification", description="What the silos' labels are for.")
    labels: Path | None = Field(
        None, description="Text file with one label a line; the order gives the class indices. For tasks that have any."
    )
    dtype: Dtype = Field(
        "auto",
        description="What FM and proxy are held and sent in, and merged/ is written in; `auto`: what the FM is stored "
        "in. LoRA, task head and optimizer are float32 in any case.",
    )
    hold: Hold = Field(
        "auto",
        description="Where the FM's weights are while the server runs. `memory`: read once, to the device; `disk`: in "
        "the FM's files, and in memory, or on the device, a layer at a time; `auto`: on disk if they are more than a "
        "fifth of the memory, or of the GPU's. A value that is not stored as `dtype` has it is in memory in any case, "
        "and so is a mixture of experts.",
    )
    max_tokens: int = Field(64, ge=1, description="Texts are cut after this many tokens. No meaning for images.")
    chat_template: Path | None = Field(
        None, description="File with a chat template (Jinja) for conversations; default: the tokenizer's own."
    )


class ProxySection(Section):
    """How the proxy is cut from the FM (method.md, section 1)."""

    keep: Literal["neurons", "layers"] = Field(
        "neurons",
        description="`neurons`: K neurons of each layer (FedPFT). `layers`: whole layers only (FedOT, for comparison).",
    )
    neurons: Annotated[int, Field(ge=1)] | Literal["hidden", "all"] = Field(
        "hidden",
        description="K, neurons kept in a compressed layer; `hidden`: K = D, the paper's setting; `all`: every neuron.",
    )
    importance: Literal["weights", "variance", "leverage", "random"] = Field(
        "leverage",
        description="By what the neurons are chosen: the size of their weights, the paper's way; the variance of what "
        "they pass on; what the others could not make up for; chance, as a control (method.md, section 0).",
    )
    importance_samples: int = Field(256, ge=1, description="Public samples on which `variance` and `leverage` look.")
    spread: Literal["equal", "global"] = Field(
        "equal",
        description="`equal`: K neurons in each compressed layer. `global`: more where they are worth more, K on "
        "average, from K / 4 to all but one.",
    )
    keep_layers: tuple[int, ...] = Field(
        (0, -1), description="Layers that stay whole; negative numbers count from the last layer."
    )
    layers: int | None = Field(
        None, ge=2, description="With `keep: layers`, how many layers stay; the first and the last always do."
    )
    allow_whole: bool = Field(
        False, description="Whether a proxy may hold every FFN neuron, which gives the FM away: for comparison only."
    )
    widths: tuple[float, ...] = Field(
        (),
        description="Sizes in which silos can have the proxy beside the whole one (`limits` in silo.yaml): shares of "
        "each compressed layer's neurons, above 0 and below 1, for each of which the output weights are refitted in "
        "closed form.",
    )

    @field_validator("widths")
    @classmethod
    def _in_order(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        names = [f"{width:g}" for width in values]
        for width, name in zip(values, names, strict=True):
            if not 0.0 < width < 1.0:
                raise ValueError(f"{name} is no share between 0 and 1; the whole proxy needs no width")
            if names.count(name) > 1:
                raise ValueError(f"{name} is there twice: name each width once")
        return tuple(sorted(values, reverse=True))

    @model_validator(mode="after")
    def _consistent(self) -> "ProxySection":
        if self.widths and (self.keep == "layers" or self.neurons == "all"):
            whole = "keep: layers" if self.keep == "layers" else "neurons: all"
            raise ValueError(f"{whole} goes without widths: no layer has neurons that could be left out; remove one")
        return self


class DistillationSection(Section):
    """Layer-level distillation, before the federation (method.md, section 2)."""

    closed_form_samples: int = Field(
        256,
        ge=0,
        description="Public samples on which the output projections are refitted before the first step; 0: none.",
    )
    closed_form_ridge: Annotated[float, Field(gt=0.0)] | Literal["held_out"] = Field(
        "held_out",
        description="r of that refit, in units of the mean square of a neuron's value; `held_out`: of several powers "
        "of ten, in each layer the one that does best on every fifth batch, which the refit then has not seen.",
    )
    closed_form_probes: float = Field(
        0.0,
        ge=0.0,
        description="How much it counts, beside the hidden states, that they change as the FM's do when a random LoRA "
        "is put on both; 0: not at all.",
    )
    steps: int = Field(
        0,
        ge=0,
        description="Optimizer steps after the closed form; 0 here and in `closed_form_samples`: no layer-level "
        "distillation.",
    )
    mode: Literal["auto", "whole", "layers"] = Field(
        "auto",
        description="What a step trains. `whole`: all compressed layers together, on samples of its own; it needs "
        "several times the proxy's size in memory. `layers`: one layer, from what the closed form has brought to it, "
        "before the next layer is looked at; each layer takes `steps` of them, on `closed_form_samples`. `auto`: "
        "`layers` if the FM is on disk.",
    )
    batch: int = Field(16, ge=1, description="Public samples a step.")
    learning_rate: Rate = Field(6e-4, description="Peak rate of AdamW; linear warm-up, then linear decay to 0.")
    warmup_fraction: Fraction = Field(0.048, description="Share of the steps over which the rate rises.")
    weight_term: float = Field(
        0.01, ge=0.0, description="a: weight of the term on W_out W_in. The paper has 0.01 for text, 0 for images."
    )
    probe_term: float = Field(
        0.0,
        ge=0.0,
        description="Weight of the term on how hidden states change under a random LoRA, another one in each step, "
        "which then takes twice as long. It draws the proxy's gradient to the FM's.",
    )
    logit_term: float = Field(
        0.0,
        ge=0.0,
        description="Weight of the divergence between the next tokens that FM and proxy foresee; language models only.",
    )
    local: bool = Field(
        False,
        description="Whether each compressed layer learns by itself, from the FM's hidden states before it, and not "
        "from what the proxy's own layers make of them.",
    )
    gradient_clip: float = Field(1.0, gt=0.0, description="Largest gradient norm.")

    @model_validator(mode="after")
    def _consistent(self) -> "DistillationSection":
        if self.local and self.logit_term:
            raise ValueError("local: true goes without logit_term, which would reach the last layer only")
        if self.mode == "layers" and (self.local or self.logit_term or self.probe_term):
            raise ValueError("mode: layers goes without local, logit_term and probe_term")
        if self.mode == "layers" and self.steps and not self.closed_form_samples:
            raise ValueError("mode: layers takes its samples from closed_form_samples, which is 0")
        return self


class AlignmentSection(Section):
    """Neuron-level distillation, during the federation (method.md, section 4)."""

    every_rounds: int = Field(2, ge=0, description="t: rounds between two alignments; 0: none.")
    updated_fraction: Fraction = Field(0.5, description="p: share of each compressed layer's neurons that is updated.")
    update: Literal["inactive", "active", "random", "gradient"] = Field(
        "inactive",
        description="Which neurons those are. `inactive`: those that are inactive at most tokens, as in the paper; "
        "`active`: at fewest; `random`: any, other ones each time; `gradient`: those whose weights have the largest "
        "gradient of the distillation's loss. With the last two no silo counts anything.",
    )
    counts: Literal["public", "silos"] = Field(
        "public",
        description="Where a neuron's inactivity is counted: `public`: by the server, on public data, so that no "
        "counts leave a silo; `silos`: in their training, as in the paper.",
    )
    inactive_below: float = Field(
        0.01, ge=0.0, description="eps: a neuron is inactive at a token if |act(z)| <= eps. Use 0 for ReLU."
    )
    closed_form_samples: int = Field(
        0,
        ge=0,
        description="Public samples on which the updated neurons' output weights are refitted before the first step, "
        "with `distillation.closed_form_ridge: held_out`; 0: none.",
    )
    steps: int = Field(30, ge=0, description="Optimizer steps of one alignment.")
    batch: int = Field(16, ge=1, description="Public samples a step.")
    learning_rate: Rate = Field(2e-4, description="Peak rate of AdamW, with the same schedule as the distillation.")
    probe_term: float = Field(0.0, ge=0.0, description="As `distillation.probe_term`, around the adapter of the round.")

    @property
    def asks_silos(self) -> bool:
        """Whether silos are to count their inactive neurons."""
        return self.update in ("inactive", "active") and self.counts == "silos"


class PlugInSection(Section):
    """Refining the plugged-in adapter at the server (method.md, section 5). A run may go on with other values."""

    layer_scales: bool = Field(
        False,
        description="Whether each layer's LoRA is multiplied by the number that brings its effect on the FM nearest to "
        "the one on the proxy.",
    )
    steps: int = Field(0, ge=0, description="Optimizer steps on the FM's LoRA, after that; 0: none.")
    batch: int = Field(16, ge=1, description="Public samples a step.")
    learning_rate: Rate = Field(2e-4, description="AdamW's rate in the first step; it falls to 0 in a straight line.")
    towards: Literal["change", "proxy"] = Field(
        "change",
        description="What the FM is brought near to. `change`: what tuning changed in the proxy's hidden states, as a "
        "change of its own; `proxy`: the tuned proxy's answers.",
    )

    @property
    def is_on(self) -> bool:
        """Whether there is anything to do."""
        return self.layer_scales or self.steps > 0


class AdapterSection(Section):
    """LoRA on query, key, value and attention output of every layer, or on its FFN too (method.md, section 3)."""

    rank: int = Field(8, ge=0, le=4096, description="R; 0: no LoRA, only the task head trains.")
    alpha: float = Field(48.0, gt=0.0, description="LoRA's scale is alpha / rank.")
    dropout: float = Field(0.1, ge=0.0, lt=1.0, description="Dropout on the input of LoRA on attention.")
    ffn: bool = Field(
        False,
        description="Whether LoRA is on the FFN's projections too, in the proxy on the neurons that it keeps; plugged "
        "in, the FM's other neurons stay as they are. Not for mixtures of experts.",
    )


class PrivacySection(Section):
    """Differential privacy of a silo's samples: what all rounds together may say of any one of them (privacy.md)."""

    epsilon: float = Field(
        8.0,
        gt=0.0,
        le=1000.0,
        description="The most that is ever spent on the data of one work directory, over all rounds, restarts and "
        "federations.",
    )
    delta: float = Field(
        1e-5,
        gt=0.0,
        lt=0.1,
        description="The probability that epsilon does not bound it; below 1 / samples, or it means nothing.",
    )
    clip: float = Field(
        1.0, gt=0.0, le=1e6, description="Largest norm of a sample's gradient; what is beyond it is cut."
    )

    @staticmethod
    def stricter(own: "PrivacySection | None", asked: "PrivacySection | None") -> "PrivacySection | None":
        """What a silo keeps to: its own and what the server asks, whichever is stricter, and the own `clip`."""
        if own is None or asked is None:
            return own or asked
        both = {"epsilon": min(own.epsilon, asked.epsilon), "delta": min(own.delta, asked.delta)}
        return own.model_copy(update=both)


class TrainingSection(Section):
    """What each silo does in a round; sent to the silos by the server."""

    rounds: int = Field(6, ge=1, description="Rounds of the federation.")
    local_epochs: float = Field(
        1.0,
        gt=0.0,
        le=1e6,
        description="Share of its samples a silo goes through in a round; below 1 the next round goes on from there.",
    )
    batch: int = Field(32, ge=1, description="Samples a step.")
    learning_rate: Rate = Field(
        8e-4, description="AdamW's rate for LoRA in the first step; `schedule` says what becomes of it."
    )
    head_learning_rate: Rate | None = Field(
        None,
        description="The same for the task head, which starts from nothing and may need more; default: learning_rate.",
    )
    schedule: Schedule = Field(
        "linear",
        description="How the rates fall over the steps of all rounds: to 0 in a straight line, to 0 along half a "
        "cosine, or not at all.",
    )
    packing: bool = Field(
        False,
        description="Whether a language model's rows are trained end to end in sequences without padding. A silo whose "
        "proxy cannot keep them apart exactly says so, and pads.",
    )
    weight_decay: float = Field(0.01, ge=0.0, description="AdamW's decoupled weight decay.")
    adam_epsilon: float = Field(
        1e-8,
        ge=1e-12,
        lt=1.0,
        description="AdamW's epsilon: gradients that are much smaller than it make small steps, all others steps of "
        "the same size. A larger one lets a silo rest that has nothing more to learn.",
    )
    gradient_clip: float = Field(1.0, gt=0.0, description="Largest gradient norm.")
    proximal: float = Field(
        0.0,
        ge=0.0,
        le=1e6,
        description="mu of FedProx: how hard a silo is pulled back to the adapter that the round began with; 0: not.",
    )
    frozen_a: bool = Field(
        False,
        description="Whether LoRA's A stays as it was drawn, so that only B and the task head train (FFA-LoRA): the "
        "mean of the silos' adapters is then exactly the mean of their changes to the weights.",
    )
    logit_adjustment: Literal["none", "own"] = Field(
        "own",
        description="`own`: a silo's loss shifts each class's logit by the log of the class's share among the silo's "
        "own labels, so that it learns what tells the classes apart, and not how often it has each; one with one class "
        "learns nothing, in place of naming it always. `none`: as in the paper. Of tasks without a label list both are "
        "the same.",
    )
    privacy: PrivacySection | None = Field(
        None,
        description="Differential privacy that every silo is to keep at least; one whose silo.yaml is stricter keeps "
        "that. Default: each silo's own affair.",
    )
    update_encoding: Literal["exact", "bfloat16", "int8"] = Field(
        "exact",
        description="How an update travels: the adapter bit for bit, or its change in the round as bfloat16 or as int8 "
        "blocks; what is rounded off, the silo adds to its next update.",
    )


class SiloPrivacyBound(Section):
    """How much at most the sums of a federation may say of a whole silo (privacy.md)."""

    epsilon: float = Field(
        8.0,
        gt=0.0,
        le=1000.0,
        description="The most that all sums of the federation together say of a silo, beyond that it takes part.",
    )
    delta: float = Field(1e-5, gt=0.0, lt=0.1, description="The probability that epsilon does not bound it.")


class SiloPrivacySection(SiloPrivacyBound):
    """Differential privacy of whole silos: in a round's sum noise hides what any one of them put in (privacy.md)."""

    clip: float = Field(
        1.0,
        gt=0.0,
        le=1e6,
        description="Largest L2 norm of a silo's change to the adapter in a round; the silo shrinks a larger one.",
    )


class SiloPrivacyTerms(SiloPrivacySection):
    """What all silos know of it, and from which each finds its share of the noise."""

    rounds: int = Field(ge=1, description="As `training.rounds`: no silo takes part in more.")


class FederationSection(Section):
    """Who takes part, and what a round waits for."""

    silos: tuple[str, ...] = Field(min_length=1, description="Names of the silos, as in their certificates.")
    min_silos: int | None = Field(
        None, ge=1, description="Fewest updates that make a round; default: all that were picked."
    )
    sample_fraction: float = Field(1.0, gt=0.0, le=1.0, description="Share of the silos picked in each round.")
    round_deadline_seconds: float = Field(
        3600.0, gt=0.0, description="Longest wait for a round's updates, then for enrolment."
    )
    max_update_norm: float | None = Field(
        None, gt=0.0, description="Largest L2 norm of an update's change to the adapter; default: no bound."
    )
    secure_aggregation: bool = Field(
        False,
        description="Whether the server learns only sums over all silos of a round, and nothing of one of them "
        "(privacy.md). It needs `tls`, and 2 to 64 silos a round.",
    )
    silo_privacy: SiloPrivacySection | None = Field(
        None,
        description="With `secure_aggregation`, differential privacy of whole silos: each adds a share of the noise, "
        "so that the sum over `min_silos` has enough. Of use with hundreds of silos. Default: none.",
    )


def fraction_bits(most_samples: int, max_entry: float) -> int:
    """f: an entry of a secure sum counts steps of 2^-f; the most with which the words of MOST_SILOS do not wrap.

    Raises:
        ValueError: there is none, with the arithmetic.
    """
    limit = (1 << WORD_BITS - 1) - 1
    found = math.floor(math.log2(limit / (MOST_SILOS * most_samples * max_entry)))
    while MOST_SILOS * math.ceil(most_samples * max_entry * 2.0**found) > limit:
        found -= 1
    if found < 0:
        raise ValueError(
            f"{MOST_SILOS} silos x most_samples {most_samples} x max_entry {max_entry:g} = "
            f"{MOST_SILOS * most_samples * max_entry:g} could wrap a word of {WORD_BITS} bits, which holds up to "
            f"{limit}; lower one of the two"
        )
    return found


def largest_private_sum(clip: float, min_silos: int, silos: int, bits: int) -> int:
    """With silo_privacy: what an entry of the sum over so many silos does not pass, in steps of 2^-bits."""
    step = clip * 2.0**bits
    noise = NOISE_TAIL * MOST_NOISE * (step + MOST_ROUNDED) * math.sqrt(silos / min_silos)
    return silos * math.ceil(step) + math.ceil(noise)


def private_fraction_bits(clip: float, min_silos: int) -> int:
    """f with silo_privacy: the most with which a sum and its noise do not wrap; there are fewer than 2 min_silos silos.

    Raises:
        ValueError: there is none, with the arithmetic.
    """
    limit, most = (1 << WORD_BITS - 1) - 1, 2 * min_silos - 1
    found = math.floor(math.log2(limit / clip))
    while found >= 0 and largest_private_sum(clip, min_silos, most, found) > limit:
        found -= 1
    if found < 0:
        raise ValueError(
            f"federation.silo_privacy: {most} silos x clip {clip:g} and noise of up to {NOISE_TAIL:g} x "
            f"{MOST_NOISE:g} x clip x sqrt({most} / {min_silos}) could wrap a word of {WORD_BITS} bits, which holds up "
            f"to {limit}; lower the clip"
        )
    return found


class SecureAggregationSection(Section):
    """Bounds of what is summed with `federation.secure_aggregation` (privacy.md). They are no secret."""

    most_samples: int = Field(
        100_000,
        ge=1,
        description="Samples that a silo trains on in a round, at most. One that has more does not take part. The "
        "sum's steps are finer the lower this and `max_entry` are.",
    )
    max_entry: float = Field(
        1.0,
        gt=0.0,
        le=1e6,
        description="Largest change of a value of the adapter in a round; a silo cuts what is beyond it, and says so.",
    )
    threshold_fraction: float = Field(
        0.5,
        ge=0.5,
        lt=1.0,
        description="More than this share of a round's silos, and at least `federation.min_silos`, must sign and help "
        "to open a sum. A higher one withstands more silos that plot with the server, and fewer that drop out.",
    )
    stage_deadline_seconds: float = Field(
        300.0,
        gt=0.0,
        description="Longest wait for silos in each stage after the training, while no vector is on its way.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "SecureAggregationSection":
        fraction_bits(self.most_samples, self.max_entry)
        return self


class SecureTerms(Section):
    """What all silos of a federation know of its secure aggregation, and hold each other to. Sent as JSON."""

    most_samples: int = Field(ge=1, description="As `secure_aggregation.most_samples`.")
    max_entry: float = Field(gt=0.0, description="As `secure_aggregation.max_entry`.")
    threshold_fraction: float = Field(ge=0.5, lt=1.0, description="As `secure_aggregation.threshold_fraction`.")
    min_silos: int = Field(ge=2, description="Fewest silos of a sum.")
    weights: Literal["samples", "diversity", "equal"] = Field(description="As `aggregation.weights`.")
    silo_privacy: SiloPrivacyTerms | None = Field(None, description="As `federation.silo_privacy`, and for how long.")

    @property
    def fraction_bits(self) -> int:
        """f; ValueError if there is none."""
        if self.silo_privacy is not None:
            return private_fraction_bits(self.silo_privacy.clip, self.min_silos)
        return fraction_bits(self.most_samples, self.max_entry)

    def largest_sum(self, silos: int) -> int:
        """What an entry of the sum over so many silos does not pass."""
        if self.silo_privacy is not None:
            return largest_private_sum(self.silo_privacy.clip, self.min_silos, silos, self.fraction_bits)
        return silos * math.ceil(self.most_samples * self.max_entry * 2.0**self.fraction_bits)

    def threshold(self, silos: int) -> int:
        """How many of so many silos sign and open a sum."""
        return max(int(Decimal(str(self.threshold_fraction)) * silos) + 1, self.min_silos)

    @model_validator(mode="after")
    def _consistent(self) -> "SecureTerms":
        _ = self.fraction_bits
        return self


class AggregationSection(Section):
    """What the server makes of a round's updates: federated averaging (method.md, section 3), or more robust means."""

    mean: Literal["weighted", "trimmed", "median", "krum"] = Field(
        "weighted",
        description="`weighted`: all updates, by `weights`. The others resist silos that send nonsense or lie, and do "
        "not weigh by samples, which are a silo's own claim. `trimmed`: of each value the mean without the largest and "
        "the smallest; `median`: of each value the median; `krum`: multi-Krum, the plain mean without those "
        "`byzantine` updates that are farthest from the others. With `trimmed` or `median` a round has 3 updates or "
        "more.",
    )
    weights: Literal["samples", "diversity", "equal", "steps"] = Field(
        "diversity",
        description="How much an update counts in the `weighted` mean. `samples`: by those it was trained on; "
        "`diversity`: by those times how far the silo's labels differ, which it tells: one with one class has nothing "
        "to say of what tells classes apart (without labels: `samples`); `equal`: each the same; `steps`: by samples, "
        "but each silo's change is first divided by its number of local steps, so that one that took more of them does "
        "not pull farther (FedNova); the more unlike the silos' sizes, the nearer this is to the sum of their changes.",
    )
    trimmed_fraction: float = Field(
        0.2,
        ge=0.0,
        lt=0.5,
        description="With `trimmed`, the share of the updates that is left out on each side, rounded down, but at "
        "least one; 0: none. Choose no less than the share of silos that may lie.",
    )
    byzantine: int = Field(
        1, ge=0, description="With `krum`, f: how many silos of a round may lie. It then has at least 2 f + 3 updates."
    )
    optimizer: Literal["none", "momentum", "adam", "yogi"] = Field(
        "none",
        description="What the server does with the mean's change to the adapter. `none`: it adds it; `momentum`, "
        "`adam`, `yogi`: it takes it for a gradient (FedAvgM, FedAdam, FedYogi).",
    )
    learning_rate: float | None = Field(
        None,
        gt=0.0,
        description="The server's own rate; default: 1 with `none` and `momentum`, 0.01 with `adam` and `yogi`.",
    )
    beta1: float = Field(
        0.9,
        ge=0.0,
        lt=1.0,
        description="How much of the changes so far is kept from round to round. With `momentum` they add up to "
        "1 / (1 - beta1) times the learning rate.",
    )
    beta2: float = Field(0.99, ge=0.0, lt=1.0, description="The same of their squares, with `adam` and `yogi`.")
    epsilon: float = Field(
        1e-3, gt=0.0, description="With `adam` and `yogi`, tau: changes that are small beside it are not enlarged."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "AggregationSection":
        if self.mean != "weighted" and self.weights in ("equal", "steps"):
            raise ValueError(f"weights: {self.weights} goes with mean: weighted, not with {self.mean}")
        return self

    @property
    def asks_for_diversity(self) -> bool:
        """Whether a silo is to tell how far its labels differ."""
        return self.mean == "weighted" and self.weights == "diversity"

    @property
    def rate(self) -> float:
        """The server's learning rate."""
        return self.learning_rate or (0.01 if self.optimizer in ("adam", "yogi") else 1.0)

    @property
    def fewest_updates(self) -> int:
        """With fewer the mean is not defined, or resists nobody."""
        if self.mean == "krum":
            return 2 * self.byzantine + 3
        return 3 if self.mean == "median" or (self.mean == "trimmed" and self.trimmed_fraction) else 1

    def trimmed(self, updates: int) -> int:
        """How many of the updates are left out on each side."""
        share = int(Decimal(str(self.trimmed_fraction)) * updates)  # of what was written: 0.29 of 100 are 29
        return max(share, 1) if self.trimmed_fraction else 0


class TlsSection(Section):
    """Mutual TLS. `fedpft provision` writes these files and the sections that name them."""

    ca: Path = Field(description="Certificate of the federation's own authority (PEM).")
    certificate: Path = Field(description="This side's certificate (PEM).")
    key: Path = Field(description="This side's private key (PEM), readable by its owner only.")


class ServerTlsSection(TlsSection):
    """Mutual TLS at the server."""

    revoked: Path | None = Field(
        None,
        description="List of the certificates that are shut out, as `fedpft provision --revoke` writes it; read again "
        "whenever it changes.",
    )


class ColumnsSection(Section):
    """Where the fields stand in a data file with a header line."""

    text: str = Field("text", description="Column that holds the text.")
    image: str = Field("image", description="Column that holds the image's path, relative to the data file.")
    words: str = Field("words", description="Column that holds the words of a text.")
    messages: str = Field("messages", description="Column that holds a conversation.")
    prompt: str = Field("prompt", description="Column that holds what is asked.")
    completion: str = Field("completion", description="Column that holds the answer to it.")
    label: str = Field("label", description="Column that holds the label, or the number.")
    labels: str = Field("labels", description="Column that holds any number of labels.")
    tags: str = Field("tags", description="Column that holds a tag for each word.")


class ProductSection(Section):
    """What the owner gets in the end."""

    base_model_name: str | None = Field(
        None,
        min_length=1,
        description="What the PEFT adapter calls the FM that it is for: a name on a hub; default: `model.path`.",
    )


class EvaluationSection(Section):
    """What the server measures on its test data."""

    every_rounds: int = Field(
        1, ge=0, description="Rounds between two measurements of proxy and plugged-in model; 0: only at the end."
    )
    samples_per_round: int = Field(
        500, ge=1, description="Test samples used in a measurement between rounds; the last one uses all."
    )
    batch: int = Field(64, ge=1, description="Samples a step.")
    gap_samples: int = Field(
        16,
        ge=0,
        description="Public samples on which hidden states and adapter gradients of proxy and FM are compared, before "
        "and after each distillation; 0: they are not.",
    )
    written_samples: int = Field(
        50,
        ge=0,
        description="Test samples that are answered in words at the end, for tasks whose answers are words; 0: none. "
        "With the FM on disk each word takes a pass through it.",
    )
    logit_offset: bool = Field(
        False,
        description="Whether a language model is also measured with the tuning added to the FM's logits in place of "
        "its weights: those of the FM as it was + those of the tuned proxy - those of the untuned one.",
    )


class Endpoint(Section):
    """What server.yaml and silo.yaml share: where to meet, and how each proves who it is."""

    tls: TlsSection | None = Field(None, description="Key and certificates; needed, unless `insecure_loopback`.")
    insecure_loopback: bool = Field(
        False,
        description="For tests: no TLS, on 127.0.0.1 or [::1] only; a silo is then called `insecure_name`.",
    )

    def _check_transport(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            host.strip("[]").encode("idna")
        except UnicodeError:
            raise ValueError(f"{host} cannot be the name of a host") from None
        if int(port) > 65535:
            raise ValueError(f"there is no port {port}: the last is 65535")
        if self.insecure_loopback and host not in ("127.0.0.1", "[::1]", "localhost"):
            raise ValueError(f"insecure_loopback is for loopback addresses, not {host}")
        if self.insecure_loopback == (self.tls is not None):
            raise ValueError("exactly one of tls and insecure_loopback must be given")


class PartitionSection(Section):
    """How one labelled file is dealt out to simulated silos."""

    kind: Literal["iid", "dirichlet", "quantity", "shards", "column"] = Field(
        "iid",
        description="`iid`: evenly, at random. `dirichlet`: each class in uneven shares. `quantity`: at random, in "
        "uneven sizes. `shards`: few classes each. `column`: by the values of a column, such as a speaker.",
    )
    concentration: float = Field(
        1.0, gt=0.0, le=1e9, description="Of the Dirichlet that shares are drawn from: near 0 very uneven, large even."
    )
    shards: int = Field(2, ge=1, description="With `kind: shards`, how many shards of the sorted file a silo gets.")
    column: str | None = Field(
        None,
        min_length=1,
        description="With `kind: column`, the column whose values stay whole; with `dirichlet`, the one that takes the "
        "place of the label.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "PartitionSection":
        if self.kind == "column" and self.column is None:
            raise ValueError("kind: column needs `column`, the name of a column of the data file")
        if self.column is not None and self.kind not in ("column", "dirichlet"):
            raise ValueError(f"`column` has no meaning with kind: {self.kind}; it is for kind: column and dirichlet")
        return self


# Where the defaults are others than the paper's; docs/results.md has what that is worth. The closed form is no part of
# the paper. It stays, with a fixed ridge, as it stands in for most of five epochs of distillation.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "proxy": {"importance": "weights"},
        "distillation": {"closed_form_ridge": 1e-3, "steps": 250},
        "alignment": {"counts": "silos"},
        "training": {"logit_adjustment": "none"},
        "aggregation": {"weights": "samples"},
    }
}


class ServerConfig(Endpoint):
    """The FM owner's side. Relative paths start at the file's own directory."""

    preset: Literal["paper"] | None = Field(
        None,
        description="`paper`: the paper's values where the defaults are others. Keys that are given count before it.",
    )

    tls: ServerTlsSection | None = Field(None, description="Key and certificates; needed, unless `insecure_loopback`.")
    seed: int = Field(0, ge=0, description="Every random choice of the federation derives from it.")
    out: Path = Field(description="Run directory: proxy, adapters, summary.json, report.html.")
    listen: Address = Field(description="host:port to listen on; port 0 takes a free one and writes it to OUT/address.")
    device: str = Field("cpu", description="Torch device for distillation and evaluation.")
    threads: int | None = Field(None, ge=1, le=MOST_THREADS, description="CPU threads of torch; default: all cores.")
    model: ModelSection = Field(description="The foundation model.")
    proxy: ProxySection = Field(default_factory=ProxySection, description="How the proxy is cut.")
    proxy_path: Path | None = Field(
        None, description="A proxy made by `fedpft build-proxy`; default: the server builds it."
    )
    distillation: DistillationSection = Field(default_factory=DistillationSection, description="Before the federation.")
    alignment: AlignmentSection = Field(default_factory=AlignmentSection, description="During the federation.")
    adapter: AdapterSection = Field(default_factory=AdapterSection, description="What the silos train.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="How they train it.")
    aggregation: AggregationSection = Field(
        default_factory=AggregationSection, description="What becomes of their updates."
    )
    federation: FederationSection = Field(description="Who takes part.")
    secure_aggregation: SecureAggregationSection = Field(
        default_factory=SecureAggregationSection, description="What a secure sum can hold."
    )
    public_data: Path = Field(description="Unlabelled data file for both distillations; no silo's.")
    test_data: Path | None = Field(
        None, description="Labelled data file that only the server has; none: no evaluation."
    )
    columns: ColumnsSection = Field(default_factory=ColumnsSection, description="Columns of public_data and test_data.")
    encoding: str | None = Field(
        None,
        description="Encoding of public_data, test_data and model.labels, such as `cp1252`; default: UTF-8, or what a "
        "file's byte order mark says.",
    )
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="What is measured when.")
    plug_in: PlugInSection = Field(default_factory=PlugInSection, description="After the last round.")
    product: ProductSection = Field(default_factory=ProductSection, description="The tuned model.")

    _known_encoding = field_validator("encoding")(_check_encoding)

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("preset"), str):
            return values
        found = dict(values)
        for section, keys in PRESETS.get(values["preset"], {}).items():
            given = values.get(section, {})
            if isinstance(given, dict):  # or it is refused
                found[section] = keys | given
        return found

    @model_validator(mode="after")
    def _consistent(self) -> "ServerConfig":
        self._check_transport(self.listen)
        if self.federation.silos:  # those of a simulation may be found later
            self.check_silos()
        if self.proxy.keep == "layers" and self.proxy.layers is None:
            raise ValueError("proxy.layers is needed with proxy.keep: layers")
        if self.proxy.widths:
            self._check_widths()
        if not self.adapter.rank:
            self._check_no_probes()
        if self.training.privacy is not None:
            self._check_private()
        if self.federation.secure_aggregation:
            self._check_secure()
        if self.federation.silo_privacy is not None:
            self._check_silo_privacy(self.federation.silo_privacy)
        return self

    def _check_widths(self) -> None:
        if not self.distillation.closed_form_samples:
            raise ValueError(
                "proxy.widths needs distillation.closed_form_samples, which is 0: nothing would refit the proxy for "
                "them; set it to 256, say"
            )
        if self.adapter.ffn:
            raise ValueError(
                "proxy.widths goes without adapter.ffn: true, for which every silo needs all neurons; leave one out"
            )

    def _check_private(self) -> None:
        odd = {
            "training.packing: true": (self.training.packing, "set it to false: packed rows have no gradient each"),
            "adapter.ffn: true": (self.adapter.ffn, "set it to false: LoRA there has no gradient of each sample"),
            "alignment.counts: silos": (
                self.alignment.every_rounds > 0 and self.alignment.asks_silos,
                "set it to public: no silo counts inactive neurons then",
            ),
        }
        if found := [(key, remedy) for key, (is_set, remedy) in odd.items() if is_set]:
            raise ValueError(f"training.privacy does not go with {found[0][0]}; {found[0][1]}")

    def _check_secure(self) -> None:
        """Raises ValueError for what looks at single updates, or cannot be added."""
        federation, aggregation, encoding = self.federation, self.aggregation, self.training.update_encoding
        fault = ""
        if self.insecure_loopback and not self._is_simulated:
            fault = "needs tls: by their certificates silos know each other's keys from the server's"
        elif federation.max_update_norm is not None:
            fault = "goes without federation.max_update_norm: the server sees no silo's update that it could measure"
        elif aggregation.mean != "weighted":
            fault = f"goes without aggregation.mean: {aggregation.mean}, which compares the silos' updates one by one"
        elif aggregation.weights == "steps":
            fault = "goes without aggregation.weights: steps, which needs every silo's number of steps"
        elif encoding != "exact":
            fault = f"goes without training.update_encoding: {encoding}: rounded apart, updates do not add up exactly"
        if fault:
            raise ValueError(f"federation.secure_aggregation {fault}")

    def _check_silo_privacy(self, section: SiloPrivacySection) -> None:
        """Raises ValueError for what would say something of a silo beside its part in the noised sum."""
        fault = ""
        if not self.federation.secure_aggregation:
            fault = "needs federation.secure_aggregation: true: only in a sum does the noise of all hide each"
        elif self.aggregation.weights != "equal":
            fault = f"goes without aggregation.weights: {self.aggregation.weights}, which says how much a silo has; set"
            fault += " it to equal"
        elif self.alignment.every_rounds > 0 and self.alignment.asks_silos:
            fault = "goes without alignment.counts: silos, which has no noise; set it to public"
        elif self.federation.min_silos is None:
            fault = "needs federation.min_silos: a silo adds the share of the noise of one among so many"
        if fault:
            raise ValueError(f"federation.silo_privacy {fault}")
        private_fraction_bits(section.clip, self.federation.min_silos or 2)

    @property
    def most_picked(self) -> int:
        """Silos of a round, at most."""
        section = self.federation
        return max(math.ceil(section.sample_fraction * len(section.silos)), section.min_silos or self.fewest_updates)

    @property
    def fewest_updates(self) -> int:
        """With fewer there is no mean, or the sum hides nobody."""
        return max(self.aggregation.fewest_updates, 2 if self.federation.secure_aggregation else 1)

    @property
    def secure_terms(self) -> SecureTerms | None:
        """What the silos are told of secure aggregation; None without."""
        section, weights = self.secure_aggregation, self.aggregation.weights
        if not self.federation.secure_aggregation or weights == "steps":
            return None
        return SecureTerms(
            most_samples=section.most_samples,
            max_entry=section.max_entry,
            threshold_fraction=section.threshold_fraction,
            min_silos=self.federation.min_silos or 2,
            weights=weights,
            silo_privacy=None
            if (private := self.federation.silo_privacy) is None
            else SiloPrivacyTerms(**dict(private), rounds=self.training.rounds),
        )

    _is_simulated: ClassVar[bool] = False

    def _check_no_probes(self) -> None:
        probes = {
            "distillation.closed_form_probes": self.distillation.closed_form_probes,
            "distillation.probe_term": self.distillation.probe_term,
            "alignment.probe_term": self.alignment.probe_term,
        }
        if odd := [key for key, weight in probes.items() if weight]:
            raise ValueError(f"{odd[0]} is about LoRA, of which there is none with adapter.rank: 0; set it to 0")

    def check_silos(self) -> None:
        """Raises ValueError if these silos cannot be, or are too few."""
        silos, wanted = self.federation.silos, self.federation.min_silos or 1
        if odd := next((silo for silo in silos if not re.match(SILO_NAME, silo)), None):
            raise ValueError(f"federation.silos: {odd!r} is not a name of up to 63 letters, digits, _, . and -")
        if len(set(silos)) != len(silos):
            raise ValueError("federation.silos names a silo twice")
        if wanted > len(silos):
            raise ValueError(f"federation.min_silos is {wanted}, but only {len(silos)} silos are named")
        private = self.federation.silo_privacy is not None
        most = MOST_SIMULATED if self._is_simulated and private else MOST_SILOS
        if self.federation.secure_aggregation and not 2 <= self.most_picked <= most:
            raise ValueError(f"federation.secure_aggregation is for 2 to {most} silos a round, not {self.most_picked}")
        if private and self.federation.min_silos is not None and 2 * wanted <= len(silos):
            raise ValueError(
                f"federation.silo_privacy needs min_silos of more than half of the {len(silos)} silos, not {wanted}: "
                "sums over any two such sets have a silo in common, which helps to open one of them only"
            )
        rule, fewest = self.aggregation.mean, self.fewest_updates
        if (self.federation.min_silos or len(silos)) < fewest:
            if rule == "weighted":
                fault = "needs 2 silos or more, and min_silos too: the sum over one is its update"
                raise ValueError(f"federation.secure_aggregation {fault}")
            key = f"min_silos is {wanted}" if self.federation.min_silos else f"silos names {len(silos)}"
            raise ValueError(f"aggregation.mean: {rule} needs {fewest} updates a round, but federation.{key}")


class SimulationSection(Section):
    """The silos of `fedpft simulate`, which are no processes of their own."""

    data: Path = Field(
        description="Labelled data: one file that is dealt out to the silos, or a directory with one for each, called "
        "as the silo."
    )
    silos: int | None = Field(
        None, ge=1, description="How many silos the file is dealt out to; default: those that `federation.silos` names."
    )
    partition: PartitionSection = Field(default_factory=PartitionSection, description="How the file is dealt out.")
    bad_rows: BadRows = Field("refuse", description="As `data.bad_rows` in silo.yaml.")
    threads: int = Field(
        1,
        ge=1,
        le=MOST_THREADS,
        description="CPU threads of torch for one silo's training. The last bits of a result depend on it.",
    )
    narrow_fraction: float = Field(0.0, ge=0.0, le=1.0, description="Share of the silos with little room, drawn once.")
    narrow_width: float = Field(0.5, gt=0.0, le=1.0, description="What they load, as `limits.width` in silo.yaml.")
    narrow_weights: Weights = Field("full", description="How they hold it, as `limits.weights`.")
    drop_out_fraction: float = Field(
        0.0, ge=0.0, lt=1.0, description="Share of the silos picked that fail in a round, and are back in the next."
    )


class SimulatedFederationSection(FederationSection):
    """Who takes part, and what a round waits for."""

    silos: tuple[str, ...] = Field(
        (), description="Names of the silos; default: made up, or those of the files in `simulation.data`."
    )


class SimulationConfig(ServerConfig):
    """`fedpft simulate`: server.yaml with a section more. `listen`, `tls` and `insecure_loopback` are not looked at."""

    _is_simulated: ClassVar[bool] = True

    listen: Address = Field("127.0.0.1:0", description="Not used.")
    federation: SimulatedFederationSection = Field(
        default_factory=SimulatedFederationSection, description="Who takes part."
    )
    simulation: SimulationSection = Field(description="The silos.")

    def _check_transport(self, address: str) -> None:
        """There is none."""


class RoundSettings(Section):
    """What a silo learns from the server on enrolment, beside the proxy. Sent as JSON."""

    seed: int = Field(ge=0, description="The federation's seed.")
    adapter: AdapterSection = Field(description="What the silo trains.")
    training: TrainingSection = Field(description="How it trains it.")
    inactive_below: float = Field(ge=0.0, description="eps of the inactivity counts.")
    label_diversity: bool = Field(False, description="Whether the server asks how far the silo's labels differ.")
    secure_aggregation: SecureTerms | None = Field(
        None, description="Whether only sums are sent, and what all hold each other to then."
    )


class LimitsSection(Section):
    """How a silo narrows what the server asks of it, and spares its own memory. It cannot widen anything."""

    max_batch: int | None = Field(
        None,
        ge=1,
        description="Samples that fit in memory at once; larger batches are accumulated. Default: a whole batch; with "
        "`privacy`, which keeps a gradient of each, 64.",
    )
    max_local_epochs: float | None = Field(None, gt=0.0, description="Most epochs in a round.")
    width: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Share of each compressed layer's neurons that this silo loads of the proxy: those that matter "
        "most. With one of the server's `proxy.widths` their output weights are refitted for them. The adapter is the "
        "same and counts as any other. Takes effect at the silo's next start.",
    )
    memory_gib: float | None = Field(
        None,
        gt=0.0,
        description="In place of `width`: memory for the proxy's frozen weights. `width` is then the largest with "
        "which they fit, of 1 and the server's `proxy.widths`, or of the multiples of 1/16 if it has none. The silo's "
        "log says it.",
    )
    checkpointing: bool = Field(
        False,
        description="Keep only the input of each layer for the backward pass and compute the layer again there: far "
        "less memory, half as much time again, the same result.",
    )
    weights: Weights = Field(
        "full",
        description="How the frozen matrices of attention and FFNs are held: as the proxy came, or in 8 or 4 bits a "
        "value (`pip install 'fedpft[quantized]'`). Far less memory, a little time, and an adapter that is trained on "
        "a coarser proxy; it is the same in shape and counts as any other. Takes effect at the silo's next start.",
    )
    compact: bool = Field(
        False,
        description="Keep what the frozen FFNs need for the backward pass in bfloat16: half that memory, and gradients "
        "that are off by some 0.1 %. Far less to win than with `checkpointing`.",
    )
    sharded: bool = Field(
        False,
        description="Of several processes (`torchrun`) each holds its share of the proxy's frozen layers, and they "
        "gather a layer whenever it computes: for a proxy that does not fit one device. The same result.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "LimitsSection":
        if self.memory_gib is not None and self.width < 1.0:
            raise ValueError("memory_gib chooses width: leave one of them out")
        if self.memory_gib is not None and self.weights != "full":
            raise ValueError("memory_gib does not go with weights in few bits: set width by hand")
        if self.sharded and (self.width < 1.0 or self.memory_gib is not None):
            raise ValueError("sharded does not go with width or memory_gib: leave one of them out")
        if self.sharded and self.weights != "full":
            raise ValueError("sharded does not go with weights in few bits: leave one of them out")
        return self


class ShareSection(Section):
    """What may leave the silo beside adapter and sample count. `fedpft silo --explain` prints all that leaves."""

    metrics: tuple[SharedMetric, ...] = Field(
        get_args(SharedMetric),
        description="Numbers about the training and its data that go with an update.",
    )
    inactivity: bool = Field(
        True, description="Whether the server learns how often each of the proxy's neurons was inactive, if it asks."
    )


Requirement = Literal["secure_aggregation", "silo_privacy"]


class SiloDataSection(Section):
    """The institution's own labelled data."""

    path: Path = Field(
        description="CSV, TSV or the like, with a header line, JSON lines, Parquet or a directory of it; or "
        "images without a table: a directory with one directory a label, or WebDataset shards (data.md)."
    )
    columns: ColumnsSection = Field(default_factory=ColumnsSection, description="Which columns hold what.")
    encoding: str | None = Field(
        None, description="The file's encoding, such as `cp1252`; default: UTF-8, or what its byte order mark says."
    )
    bad_rows: BadRows = Field(
        "refuse",
        description="Rows that cannot be used, such as those with an empty cell: `refuse` names them and ends, `skip` "
        "goes on without them.",
    )

    _known_encoding = field_validator("encoding")(_check_encoding)


class SiloConfig(Endpoint):
    """An institution's side. Relative paths start at the file's own directory."""

    server: Address = Field(description="host:port of the server.")
    insecure_name: str | None = Field(None, pattern=SILO_NAME, description="With insecure_loopback: this silo's name.")
    data: SiloDataSection = Field(description="The silo's data; it never leaves.")
    work: Path = Field(Path("work"), description="Directory for the proxy received and the last adapter sent.")
    device: str = Field("cpu", description="Torch device for training.")
    threads: int | None = Field(None, ge=1, le=MOST_THREADS, description="CPU threads of torch; default: all cores.")
    connect_timeout_seconds: float = Field(
        3600.0, gt=0.0, description="How long to try to reach a server that does not answer, each time anew."
    )
    privacy: PrivacySection | None = Field(
        None,
        description="Differential privacy of this silo's samples; the server can only ask for more. Default: none.",
    )
    silo_privacy: SiloPrivacyBound | None = Field(
        None,
        description="This silo takes part in no federation whose `silo_privacy` is weaker than this, or that has none. "
        "Default: whatever the federation has.",
    )
    limits: LimitsSection = Field(default_factory=LimitsSection, description="What this machine can take.")
    share: ShareSection = Field(default_factory=ShareSection, description="What may leave this machine.")
    require: tuple[Requirement, ...] = Field(
        (), description="What this silo demands of the federation; it does not join one without, nor stay in it."
    )
    smallest_sum: int = Field(
        2,
        ge=2,
        description="With secure aggregation, of how many silos a sum must be at least; this silo helps to open no "
        "sum of fewer, whatever the server says.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "SiloConfig":
        self._check_transport(self.server)
        if self.server.endswith(":0"):
            raise ValueError("there is no port 0 to connect to: name the server's, which it writes to OUT/address")
        if self.insecure_loopback != (self.insecure_name is not None):
            raise ValueError("insecure_name goes with insecure_loopback, and only with it")
        return self


AnyConfig = TypeVar("AnyConfig", ServerConfig, SimulationConfig, SiloConfig)
AnySection = TypeVar("AnySection", bound=Section)


def load_server_config(path: Path) -> ServerConfig:
    """Reads server.yaml; raises ConfigError naming the file, the key and, for a typo, what was probably meant."""
    raw = _read(path)
    if "simulation" in raw:
        raise ConfigError(f"{path}: section 'simulation' is for `fedpft simulate`", "start that, or remove the section")
    return _checked(path, raw, ServerConfig)


def load_owner_config(path: Path) -> ServerConfig:
    """Reads either server.yaml or simulation.yaml; raises as :func:`load_server_config` does."""
    raw = _read(path)
    return _checked(path, raw, SimulationConfig if "simulation" in raw else ServerConfig)


def load_simulation_config(path: Path) -> SimulationConfig:
    """Reads simulation.yaml; raises as :func:`load_server_config` does."""
    return _checked(path, _read(path), SimulationConfig)


def load_silo_config(path: Path) -> SiloConfig:
    """Reads silo.yaml; raises as :func:`load_server_config` does."""
    return _checked(path, _read(path), SiloConfig)


def dump(config: Section) -> dict[str, Any]:
    """The configuration as plain values, for JSON and YAML."""
    return config.model_dump(mode="json")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "give the path of a YAML file with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})", "make it a readable UTF-8 file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two of dates and depths that cannot be
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{path}{line}: {problem}", "mend the YAML there") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of keys", "see docs/configuration.md")
    return raw


def _checked(path: Path, raw: dict[str, Any], kind: type[AnyConfig]) -> AnyConfig:
    try:
        config = kind.model_validate(raw)
    except ValidationError as error:
        raise _explain(path, kind, error) from None
    return _anchor(config, path.resolve().parent)


def _explain(path: Path, kind: type[Section], error: ValidationError) -> ConfigError:
    """The first of pydantic's errors in the words of a YAML file."""
    first = error.errors()[0]
    key, section, field = _locate(kind, first["loc"])
    if first["type"] == "extra_forbidden":
        given, known = str(first["loc"][-1]), list(section.model_fields)
        guess = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
        remedy = f"did you mean {guess[0]!r}?" if guess else f"known keys here: {', '.join(known)}"
        return ConfigError(f"{path}: unknown key {key + '.' + given if key else given!r}", remedy)
    meaning = f"{key}: {field.description}" if field else "see docs/configuration.md"
    if first["type"] == "missing":
        return ConfigError(f"{path}: key {key!r} is missing", f"add {meaning}")
    message = MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
    message = message[:1].lower() + message[1:]
    if not field:
        return ConfigError(f"{path}: {message}", meaning)
    return ConfigError(f"{path}: {key}: {message}, got {first['input']!r}", meaning)


# pydantic's own texts for these speak of Python, not of YAML
MESSAGES = {
    "tuple_type": "must be a list",
    "model_type": "must be a mapping of keys",
    "string_pattern_mismatch": "does not have the right form",
}


def _locate(kind: type[Section], location: tuple[int | str, ...]) -> tuple[str, type[Section], FieldInfo | None]:
    """Follows an error's location: the key as a person writes it, the section it stands in, and its field."""
    key, section, field = "", kind, None
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
            continue
        if field is not None:
            inner = _section_of(field)
            if inner is None:
                break  # pydantic names the alternatives of a union after the field
            section = inner
        if part not in section.model_fields:
            field = None
            break
        field = section.model_fields[part]
        key = f"{key}.{part}" if key else part
    return key, section, field


def _section_of(field: FieldInfo) -> type[Section] | None:
    options = [field.annotation, *get_args(field.annotation)]
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def _anchor(section: AnySection, base: Path) -> AnySection:
    """The same section with every relative path made absolute from `base`."""
    changes: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            changes[name] = _anchor(value, base)
        elif isinstance(value, Path):
            changes[name] = base / value
    return section.model_copy(update=changes)


def reference() -> str:
    """docs/configuration.md: every field of both files, from the descriptions above."""
    return "\n".join(
        [
            "# Configuration\n",
            "YAML files, all checked on start: an unknown key is an error that says what was probably meant.",
            f"No number of things or seconds may be above {LARGEST}.",
            "This page is printed by `python -m fedpft.config`; `examples/three_silos/` is a complete working set.\n",
            *_describe("## `server.yaml`", ServerConfig),
            *_describe("## `silo.yaml`", SiloConfig),
            *_describe("## `simulation.yaml`", SimulationConfig, beside=ServerConfig),
        ]
    )


def _describe(title: str, kind: type[Section], prefix: str = "", beside: type[Section] | None = None) -> list[str]:
    """Tables of a section and of those within it, without what stands in another one `beside` it just the same."""
    lines = [
        title,
        "",
        (kind.__doc__ or "").strip(),
        "",
        "| key | value | default | meaning |",
        "| --- | --- | --- | --- |",
    ]
    sections: list[str] = []
    for name, field in kind.model_fields.items():
        if beside is not None and repr(beside.model_fields.get(name)) == repr(field):
            continue
        inner = _section_of(field)
        if inner is not None:
            sections += _describe(f"### `{prefix}{name}`", inner, f"{prefix}{name}.")
        value = "section" if inner else _value(field.annotation, field.metadata)
        default = "required" if field.is_required() else "" if inner else _default(field.default)
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {value} | {default} | {meaning} |")
    return [*lines, "", *sections]


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _value(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """What may be written, such as "whole number from 1"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        constraint = arguments[1]
        return _value(arguments[0], constraint.metadata if isinstance(constraint, FieldInfo) else arguments[1:])
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple:
        entries = arguments[0]
        return f"list of {_value(entries) if get_origin(entries) is Literal else VALUES[entries][1]}"
    if arguments:
        return " or ".join(_value(option, limits) for option in arguments if option is not type(None))
    bounds = [
        f"{word} {getattr(limit, name):g}"
        for limit in limits
        for name, word in (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "and below"))
        if hasattr(limit, name)
    ]
    return " ".join([VALUES[annotation][0], *bounds])


VALUES = {
    str: ("text", "texts"),
    int: ("whole number", "whole numbers"),
    float: ("number", "numbers"),
    bool: ("`true` or `false`", ""),
    Path: ("path", "paths"),
}


if __name__ == "__main__":
    print(reference(), end="")
