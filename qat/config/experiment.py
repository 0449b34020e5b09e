"""The experiment as one typed object: what is read, split, trained and how. Saved with every run.

Every field can be set in YAML or on the command line (``--network.width 0.125``). Defaults are the paper's
settings; where paper and released code disagree, the default is the one argued in the README's table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from qkernels.losses import GramChannel, Loss

WINDOW = 256
"""Samples of the periodic Hamming window; 129 bins, which the networks' shape needs."""
INPUT_FRAMES = 512
INPUT_BINS = 128
WORD_FRAMES = 170
"""Frames that one isolated word is cut or padded to, 1.35 s (Guizzo et al. 2021)."""

Domain = Literal["quaternion", "real", "real-on-embedding"]
Task = Literal["emotion", "speaker", "word", "word-presence"]


def require(holds: object, name: str, value: object, rule: str) -> None:
    """Refuse the value of a setting unless its rule holds.

    Raises:
        ValueError: naming all three.
    """
    if not holds:
        raise ValueError(f"{name}: {value!r} must be {rule}")


def _check_numbers(config: Any, place: str = "") -> None:
    """Refuse numbers that no setting can have, which comparisons with a limit let through."""
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            _check_numbers(value, f"{place}{one.name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float):
                require(math.isfinite(number), place + one.name, number, "finite")
            elif isinstance(number, int):
                require(abs(number) < 2**63, place + one.name, number, "below 2**63")


@dataclass(frozen=True)
class CorpusConfig:
    """The recordings of an experiment.

    Args:
        name: a known corpus (``qat corpus list``) or ``csv`` for a manifest of your own.
        folder: the corpus folder, or the manifest file when ``name`` is ``csv``.
        where: allowed values by column of the manifest, e.g. ``{speaker: [en-us+f1, en-us+m1]}``; other rows are
            dropped.
        options: options of the corpus's reader, e.g. ``{speaker: session}`` for iemocap; ``qat corpus list`` names
            them.
    """

    name: str = "demo"
    folder: Path = Path("corpora/demo")
    where: dict[str, list[str]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SpectrogramConfig:
    """Settings of the spectrograms.

    Args:
        sample_rate: sample rate in Hz.
        hop: hop between windows, in samples.
        frame_seconds: length of one cut in seconds.
        cut: rule by which a file is cut. "audio" cuts the audio in non-overlapping pieces of `frame_seconds`, drops the
            remainder and fills a short file with zeros at its end (WASPAA 2023). "reference" is the released code's
            rule: blocks are counted from the end of the file's spectrogram, and a file longer than two blocks ends with
            a block that overlaps. "word" makes one cut per file, cut or filled with zeros to 170 frames.
        time_order: order of the frames: "natural", or "reversed" (last frame first) as in the released code.
    """

    sample_rate: int = 16000
    window: ClassVar[int] = WINDOW
    hop: int = 128
    frame_seconds: float = 4.0
    cut: Literal["audio", "reference", "word"] = "audio"
    time_order: Literal["natural", "reversed"] = "natural"

    def __post_init__(self) -> None:
        for name in ("sample_rate", "hop", "frame_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")
        if self.hop > self.window:
            raise ValueError(f"hop={self.hop} must not be above the window of {self.window} samples")
        if self.cut != "word" and self.frames > INPUT_FRAMES:
            raise ValueError(
                f"frame_seconds={self.frame_seconds} at sample_rate={self.sample_rate} and hop={self.hop} gives "
                f"{self.frames} frames; the networks take at most {INPUT_FRAMES}"
            )
        if self.samples < self.window:
            raise ValueError(
                f"frame_seconds={self.frame_seconds} must hold at least one window of {self.window} samples"
            )
        for name, known in (("cut", ("audio", "reference", "word")), ("time_order", ("natural", "reversed"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")

    @property
    def samples(self) -> int:
        """Audio samples in one cut."""
        return round(self.frame_seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """Rows of one cut: 501 for 4 s, 170 for a word."""
        return WORD_FRAMES if self.cut == "word" else -(-self.samples // self.hop) + 1

    @property
    def bins(self) -> int:
        """Columns of one cut."""
        return self.window // 2 + 1


@dataclass(frozen=True)
class SplitConfig:
    """Division of the recordings into training, validation and test part.

    Args:
        rule: rule of the split: ``random`` 70/20/10 over files, the paper's random split; ``speaker`` 70/20/10 over
            speakers, or the speakers listed below; ``speaker-in-order``: the same without shuffling them (RAVDESS: 17,
            5 and 2 actors); ``paper-actor``: the released code's lists for the corpora (or manifest files) named
            iemocap, ravdess, tess and emodb; ``folds``: one fold of a cross-validation over speakers; ``part``: as the
            corpus's column ``part`` says (LibriSpeech's subsets); ``part-train-only``: its training part three times,
            as the released code's word task has it; ``confounded``: the listed speakers, and each training speaker says
            one emotion always and the others with ``leak`` of its sentences, so that the speaker predicts the emotion.
        seed: seed of the shuffled files or speakers, or of which speaker says which emotion.
        train: speakers of the training part (rules ``speaker`` and ``confounded``).
        validation: speakers of the validation part.
        test: speakers of the test part.
        leak: share of sentences kept in the other emotions (``confounded``).
        group: column that stands for the speaker in the rules ``speaker``, ``speaker-in-order`` and ``folds``:
            ``session`` for leave-one-session-out, ``text`` or ``script`` for parts that share no sentence.
        folds: number of folds (rule ``folds``), at least 3; 0: one for each group, leave-one-out.
        fold: number of the fold that is the test part, from 1; the next one is the validation part.
    """

    rule: Literal[
        "random", "speaker", "speaker-in-order", "paper-actor", "folds", "part", "part-train-only", "confounded"
    ] = "random"
    seed: int = 1
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    leak: float = 0.1
    group: str = "speaker"
    folds: int = 0
    fold: int = 1

    def __post_init__(self) -> None:
        require(0 <= self.leak <= 1, "split.leak", self.leak, "from 0 to 1")
        require(self.folds == 0 or self.folds >= 3, "split.folds", self.folds, "0 or at least 3")
        require(self.fold >= 1, "split.fold", self.fold, "at least 1")
        if self.rule == "confounded":
            require(self.group == "speaker", "split.group", self.group, "'speaker' with rule 'confounded'")


@dataclass(frozen=True)
class NetworkConfig:
    """The VGG16 that is trained (WASPAA 2023, section 3; tables 1.2 and 1.3 of the method).

    Args:
        domain: kind of network: ``quaternion`` on the RH-Emo embedding; ``real`` on the spectrogram;
            ``real-on-embedding``: the control that tells the smaller input from the Hamilton product.
        width: factor of every hidden width (1 is the paper's network).
        dropout: dropout probability of the two hidden linear layers.
        init: initialisation: ``default`` is quaternion Glorot (convolutions) and He (linears), or torchvision's VGG law
            in the real domains; ``he``: He everywhere; ``pytorch``: PyTorch's own default (real domains only).
        adaptive_pool: whether an average pool to 7x7 precedes the classifier, as in torchvision.
        rhemo: checkpoint of RH-Emo whose encoder makes the embedding (both embedding domains need it).
        rhemo_mode: treatment of RH-Emo in training: ``frozen`` (eval mode, embedded once); ``batch-statistics``: frozen
            weights, batch norm in train mode; ``trainable``: trained along.
        outputs: number of outputs, if more than there are classes (8 for TESS's 7 in the released code); the others are
            called ``unused-8`` and so on, and are never right.
        embedding_scale: divisor of the embeddings, over the training part: their ``max`` or ``rms`` (root mean square);
            or ``none``. Without batch norm, thirteen layers hardly learn from values far from 1.
    """

    domain: Domain = "quaternion"
    width: float = 1.0
    dropout: float = 0.5
    init: Literal["default", "he", "pytorch"] = "default"
    adaptive_pool: bool = False
    rhemo: Path | None = None
    rhemo_mode: Literal["frozen", "batch-statistics", "trainable"] = "frozen"
    embedding_scale: Literal["none", "max", "rms"] = "none"
    outputs: int | None = None

    def __post_init__(self) -> None:
        require(self.width > 0, "network.width", self.width, "above 0")
        require(0 <= self.dropout < 1, "network.dropout", self.dropout, "from 0 to below 1")
        require(self.outputs is None or self.outputs >= 1, "network.outputs", self.outputs, "at least 1, or absent")
        if self.domain == "quaternion":
            require(self.init != "pytorch", "network.init", self.init, "'default' or 'he' in the quaternion domain")

    @property
    def embeds(self) -> bool:
        return self.domain != "real"


@dataclass(frozen=True)
class AntiTransferConfig:
    """Anti-transfer: a loss that lowers the similarity to a frozen network's features (WASPAA 2023, equations 1-2).

    Args:
        twin: checkpoint of the network trained on the orthogonal task; absent means no anti-transfer.
        layers: convolution layers 1..13 to push apart; their losses are summed.
        beta: weight of the loss, of every layer or a list with one for each of ``layers``; 0 only monitors the
            similarity.
        position: features that layer n stands for: ``relu`` (output of conv n after ReLU, before pooling),
            ``pre-relu``, ``slice`` (the *input* of conv n, as in the older code) or ``pool5`` (always the last pool, as
            in the released code).
        loss: loss by its name, or a mapping of name and options, such as ``{name:
            folded-rowwise, clamp: product}``. The squared cosine of Gram matrices over the channels, ``gram-channel``
            (the paper's), or over the positions, ``gram-position``, which no rotation of the channels changes, so that
            it also sees what two unrelated networks have in common; both of features that are ``centred`` first, if
            true. Of matrices over the samples of the batch, one value for all of them: ``gram-batch``, or with centred
            features ``cka``, squared linear CKA. ``folded-rowwise``: the released code's, with beta squared; its
            ``clamp`` is the norms' lower bound, on ``each`` of two (newer PyTorch) or on their ``product`` (PyTorch
            1.7, with which the code ran). ``cos-squared`` and ``mse-sigmoid``: the older code's distances of maps by
            ``aggregation`` (none, mean, sum, max, mul_comp, pairwise, stochastic_pairwise; of mse-sigmoid also gram),
            one value per batch, see ``qkernels.losses``.
        cache: whether the twin's features of every sample are computed once, before training, instead of in every step.
            It takes effect where a sample's input is the same in every epoch: in the ``real`` domain or with
            ``network.rhemo_mode`` ``frozen``, unless words move in their canvas.
        cache_mib: maximum size of that cache in the device's memory, in MiB; a larger one is kept in the host's.
        random_twin: whether the twin keeps its random initialisation, as the control of what its knowledge adds.
    """

    twin: Path | None = None
    layers: list[int] = field(default_factory=lambda: [2])
    beta: float | list[float] = 1.0
    position: Literal["relu", "pre-relu", "slice", "pool5"] = "relu"
    loss: Loss = field(default_factory=GramChannel)
    cache: bool = True
    cache_mib: int = 256
    random_twin: bool = False

    def __post_init__(self) -> None:
        layers = self.layers
        valid = bool(layers) and all(1 <= layer <= 13 for layer in layers) and len(set(layers)) == len(layers)
        require(valid, "anti_transfer.layers", layers, "one or more of VGG16's convolutions 1 to 13, each once")
        number = not isinstance(self.beta, list) or len(self.beta) == len(layers)
        require(number, "anti_transfer.beta", self.beta, f"one number, or a list of {len(layers)}, one for each layer")
        require(all(beta >= 0 for beta in self.betas), "anti_transfer.beta", self.beta, "at least 0")
        if self.position == "pre-relu" and not self.loss.takes_negative:
            rule = f"behind a ReLU with loss {self.loss.plain()}, which takes no negative features"
            require(False, "anti_transfer.position", self.position, rule)
        require(self.cache_mib >= 0, "anti_transfer.cache_mib", self.cache_mib, "at least 0")
        if self.position == "pool5":
            require(len(layers) == 1, "anti_transfer.layers", layers, "one layer with position pool5")
        if self.random_twin:
            require(self.twin is None, "anti_transfer.twin", str(self.twin), "absent with random_twin")

    @property
    def betas(self) -> list[float]:
        """The weight of each layer."""
        return self.beta if isinstance(self.beta, list) else [self.beta] * len(self.layers)


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation (WASPAA 2023, section 4).

    Args:
        lr: Adam's learning rate.
        lr_factor: factor of the learning rate after ``lr_patience`` epochs without a lower validation loss.
        lr_patience: number of epochs before ``lr_factor`` applies.
        weight_decay: Adam's L2 term.
        clip: maximum global gradient norm; absent disables clipping.
        batch: samples per step, over all processes together.
        epochs: maximum number of epochs.
        patience: epochs without a lower validation loss before stopping.
        keep: state that becomes ``model.safetensors``: the ``best`` (lowest validation loss) or the ``last``.
        stopping: early-stopping rule: ``standard`` or ``reference-window`` (the released code's).
        seed: seed of initialisation, order, dropout and word offsets.
        word_offset: random place of a word in its canvas in training: one per ``sample`` or one per ``batch``.
        initial: checkpoint to start from (the second half of dual anti-transfer, transfer then anti-transfer), with
            RH-Emo's encoder where both train it; the last layer is initialised anew where the classes are others.
        initial_head: treatment of the last layer of ``initial`` where the classes are the same: ``keep``, or ``new``
            initialises it anew even there, as the released code does.
        accuracy: mean over ``samples``, or over ``batches``: the mean of the accuracies of consecutive batches, as in
            the released code, which gives the samples of a last, short batch more weight.
        device: PyTorch device; ``auto`` is CUDA where there is one.
        precision: arithmetic: ``float32``; ``tf32``: products of float32 rounded to TF32 on GPUs that can; ``bf16``:
            layers compute in bfloat16, weights and optimiser stay float32.
        deterministic: whether PyTorch's deterministic algorithms are used.
        capture: whether every step on a GPU is one captured CUDA graph: the same numbers, in a fraction of the time.
        data_mib: maximum size of inputs kept on the device, in MiB; of larger ones, batches are read from the host.
        checkpoint_seconds: minimum time between checkpoints, which are written at the end of an epoch; 0 writes one
            after every epoch. An interruption loses the epochs since the last one.
    """

    lr: float = 1e-5
    lr_factor: float = 1.0
    lr_patience: int = 10
    weight_decay: float = 0.0
    clip: float | None = None
    batch: int = 20
    epochs: int = 1000
    patience: int = 20
    keep: Literal["best", "last"] = "best"
    stopping: Literal["standard", "reference-window"] = "standard"
    seed: int = 1
    word_offset: Literal["sample", "batch"] = "sample"
    initial: Path | None = None
    initial_head: Literal["keep", "new"] = "keep"
    accuracy: Literal["samples", "batches"] = "samples"
    device: str = "auto"
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    deterministic: bool = True
    capture: bool = True
    data_mib: int = 4096
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        require(self.lr > 0, "training.lr", self.lr, "above 0")
        require(0 < self.lr_factor <= 1, "training.lr_factor", self.lr_factor, "above 0 and at most 1")
        require(self.clip is None or self.clip > 0, "training.clip", self.clip, "above 0, or absent")
        for name in ("data_mib", "checkpoint_seconds"):
            require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "at least 0")
        require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "at least 0")
        for name in ("batch", "epochs", "patience", "lr_patience"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")


EXECUTION = ("device", "capture", "data_mib", "checkpoint_seconds")
"""Fields of :class:`TrainingConfig` that do not decide what is learnt."""


@dataclass(frozen=True)
class Experiment:
    """One training of a classifier, complete: the same object makes the same run.

    Args:
        corpus: the recordings.
        task: recognised classes: ``emotion``, ``speaker``, ``word`` (one word a clip) or ``word-presence`` (which words
            of the vocabulary a line holds).
        features: settings of the spectrograms.
        normalisation: scale of the spectrograms: ``paper`` divides by the training maximum before RH-Emo and
            standardises for the real network; ``log`` is log(1 + 1000 S / max) / log 1001.
        split: division into training, validation and test part.
        network: the VGG16.
        anti_transfer: the extra loss.
        training: the optimisation.
        cache: folder of prepared spectrograms.
    """

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    task: Task = "emotion"
    features: SpectrogramConfig = field(default_factory=SpectrogramConfig)
    normalisation: Literal["paper", "max", "standard", "log"] = "paper"
    split: SplitConfig = field(default_factory=SplitConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    anti_transfer: AntiTransferConfig = field(default_factory=AntiTransferConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    cache: Path = Path("cache")

    def __post_init__(self) -> None:
        _check_numbers(self)

    @property
    def multi_label(self) -> bool:
        """Whether a sample may have several labels."""
        return self.task == "word-presence"


@dataclass(frozen=True)
class RHEmoConfig:
    """RH-Emo's own shape and loss weights (method section 3).

    Args:
        width: factor of the heads' hidden width 4096; the encoder and decoder are always the published ones.
        beta: weight of the supervised terms (0 in stage 1, 0.01 in stage 2).
        beta_class: weight of the emotion term within them.
        beta_vad: weight of each of the valence, arousal and dominance terms within them.
    """

    width: float = 1.0
    beta: float = 0.0
    beta_class: float = 1.0
    beta_vad: float = 100.0

    def __post_init__(self) -> None:
        require(self.width > 0, "rhemo.width", self.width, "above 0")
        for name in ("beta", "beta_class", "beta_vad"):
            require(getattr(self, name) >= 0, f"rhemo.{name}", getattr(self, name), "at least 0")


@dataclass(frozen=True)
class RHEmoExperiment:
    """One stage of RH-Emo's pretraining.

    Args:
        corpus: the recordings.
        features: settings of the spectrograms.
        normalisation: ``max`` (the paper's) or ``log``; both map the training part to 0..1.
        split: division into training, validation and test part.
        rhemo: width and loss weights.
        training: the optimisation; in stage 2 ``training.initial`` names stage 1's run.
        cache: folder of prepared spectrograms.
    """

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    features: SpectrogramConfig = field(default_factory=SpectrogramConfig)
    normalisation: Literal["max", "log"] = "max"
    split: SplitConfig = field(default_factory=SplitConfig)
    rhemo: RHEmoConfig = field(default_factory=RHEmoConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(lr=1e-3, batch=50, epochs=200_000, patience=100)
    )
    cache: Path = Path("cache")

    def __post_init__(self) -> None:
        _check_numbers(self)


AnyExperiment = Experiment | RHEmoExperiment
