"""The experiment as one typed object: recordings, split, network and training. Saved with every run.

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
"""Length of the periodic Hamming window in samples; it gives the 129 bins that the networks' shape requires."""
INPUT_FRAMES = 512
INPUT_BINS = 128
WORD_FRAMES = 170
"""Number of frames to which an isolated word is cut or padded, 1.35 s (Guizzo et al. 2021)."""

Domain = Literal["quaternion", "real", "real-on-embedding"]
Task = Literal["emotion", "speaker", "word", "word-presence"]


def require(holds: object, name: str, value: object, rule: str) -> None:
    """Refuse the value of a setting unless its rule holds.

    Raises:
        ValueError: with name, value and rule.
    """
    if not holds:
        raise ValueError(f"{name}: {value!r} must be {rule}")


def _check_numbers(config: Any, place: str = "") -> None:
    """Refuse numbers that no setting can have and that pass comparisons with a limit: not finite, or too large."""
    for name in [each.name for each in fields(config)]:
        value = getattr(config, name)
        if is_dataclass(value):
            _check_numbers(value, f"{place}{name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float):
                require(math.isfinite(number), place + name, number, "finite")
            elif isinstance(number, int):
                require(abs(number) < 2**63, place + name, number, "below 2**63")


@dataclass(frozen=True)
class CorpusConfig:
    """The recordings of an experiment.

    Args:
        name: known corpus (``qat corpus list``), or ``csv`` for a manifest of your own.
        folder: folder of the corpus, or the manifest file if ``name`` is ``csv``.
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
        hop: distance between windows in samples.
        frame_seconds: length of one cut in seconds.
        cut: rule by which a file is cut. "audio" cuts the audio into non-overlapping pieces of `frame_seconds`, drops
            the remainder and pads a short file with zeros at its end (WASPAA 2023). "reference" is the released code's
            rule: blocks are counted from the end of the file's spectrogram, and a file longer than two blocks ends with
            a block that overlaps. "word" makes one cut per file, cropped or padded with zeros to 170 frames.
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
            require(getattr(self, name) > 0, f"features.{name}", getattr(self, name), "above 0")
        require(self.hop <= self.window, "features.hop", self.hop, f"at most the window of {self.window} samples")
        for name, values in (("cut", ("audio", "reference", "word")), ("time_order", ("natural", "reversed"))):
            require(
                getattr(self, name) in values, f"features.{name}", getattr(self, name), f"one of {', '.join(values)}"
            )
        fits = self.cut == "word" or self.frames <= INPUT_FRAMES
        rule = (
            f"so short that a cut has at most {INPUT_FRAMES} frames; with this sample_rate and hop it has {self.frames}"
        )
        require(fits, "features.frame_seconds", self.frame_seconds, rule)
        least = f"at least one window of {self.window} samples"
        require(self.samples >= self.window, "features.frame_seconds", self.frame_seconds, least)

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
            as in the released code's word task; ``confounded``: the speakers listed below, where each training speaker
            keeps one emotion and only the share ``leak`` of its sentences in the others, so that the speaker predicts
            the emotion.
        seed: seed of the shuffled files or speakers, or of the assignment of emotions to speakers (``confounded``).
        train: speakers of the training part (rules ``speaker`` and ``confounded``).
        validation: speakers of the validation part.
        test: speakers of the test part.
        leak: share of sentences that a training speaker keeps in the other emotions (``confounded``).
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
            ``real-on-embedding``: real-valued on the embedding, the control that separates the effect of the smaller
            input from that of the Hamilton product.
        width: factor of every hidden width (1 is the paper's network).
        dropout: dropout probability of the two hidden linear layers.
        init: initialisation: ``default`` is quaternion Glorot (convolutions) and He (linear layers), or torchvision's
            VGG rule in the real domains; ``he``: He everywhere; ``pytorch``: PyTorch's own default (real domains only).
        adaptive_pool: whether an average pool to 7x7 precedes the classifier, as in torchvision.
        rhemo: checkpoint of RH-Emo whose encoder computes the embedding (required in both embedding domains).
        rhemo_mode: treatment of RH-Emo in training: ``frozen``: eval mode, embeddings computed once;
            ``batch-statistics``: frozen weights, batch norm in train mode; ``trainable``: trained with the network.
        outputs: number of outputs, if more than the number of classes (8 for the 7 classes of TESS in the released
            code); the others are named ``unused-8`` and so on and are never correct.
        embedding_scale: divisor of the embeddings: their ``max`` or ``rms`` (root mean square) over the training part,
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
        layers: convolutions 1..13 whose features are compared; their losses are summed.
        beta: weight of the loss: a number for every layer, or a list with one for each of ``layers``; 0 only monitors
            the similarity.
        position: features that layer n stands for: ``relu`` (output of conv n after ReLU, before pooling),
            ``pre-relu``, ``slice`` (the *input* of conv n, as in the older code) or ``pool5`` (the last pool for every
            n, as in the released code).
        loss: name of the loss, or a mapping of name and options, such as ``{name: folded-rowwise, clamp: product}``.
            The squared cosine of Gram matrices over the channels, ``gram-channel`` (the paper's), or over the
            positions, ``gram-position``, which is invariant to rotations of the channels and so also detects what two
            unrelated networks have in common; with ``centred`` true, features are centred first. Over the samples of
            the batch, one value per batch: ``gram-batch``, or ``cka`` with centred features (squared linear CKA).
            ``folded-rowwise``: the released code's, with beta squared; its ``clamp`` is the lower bound of the norms,
            applied to ``each`` of the two (newer PyTorch) or to their ``product`` (PyTorch 1.7, with which the code
            ran). ``cos-squared`` and ``mse-sigmoid``: the older code's distances between maps by ``aggregation`` (none,
            mean, sum, max, mul_comp, pairwise, stochastic_pairwise; mse-sigmoid also gram), one value per batch, see
            ``qkernels.losses``.
        cache: whether the twin's features of every sample are computed once, before training, instead of in every step.
            It takes effect where a sample's input is the same in every epoch: in the ``real`` domain or with
            ``network.rhemo_mode`` ``frozen``, unless words are shifted at random in their canvas.
        cache_mib: maximum size of that cache in the device's memory, in MiB; a larger cache is kept in host memory.
        random_twin: whether the twin keeps its random initialisation, as a control of the effect of its training.
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
            rule = f"after a ReLU with loss {self.loss.plain()}, which takes no negative features"
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
        seed: seed of initialisation, sample order, dropout and word offsets.
        word_offset: random position of a word in its canvas in training: one per ``sample`` or one per ``batch``.
        initial: checkpoint to start from (for the second half of dual anti-transfer, or transfer before anti-transfer),
            with RH-Emo's encoder where both train it. The last layer is initialised anew if the classes differ.
        initial_head: treatment of the last layer of ``initial`` if the classes are the same: ``keep``, or ``new``:
            initialise it anew, as the released code does.
        accuracy: mean over ``samples``, or over ``batches``: the mean of the accuracies of consecutive batches, as in
            the released code, which gives the samples of a short last batch more weight.
        device: PyTorch device; ``auto`` is CUDA where there is one.
        precision: arithmetic: ``float32``; ``tf32``: factors of float32 products are rounded to TF32 on GPUs that
            support it; ``bf16``: layers compute in bfloat16, weights and optimiser stay in float32.
        deterministic: whether PyTorch's deterministic algorithms are used.
        capture: whether every step on a GPU is one captured CUDA graph: the same results in a fraction of the time.
        data_mib: maximum size of inputs kept on the device, in MiB; batches of larger inputs are read from the host.
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
    """All settings of one training of a classifier: equal objects give equal runs.

    Args:
        corpus: the recordings.
        task: recognised classes: ``emotion``, ``speaker``, ``word`` (one word a clip) or ``word-presence`` (the words
            of the vocabulary that occur in a clip).
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
    """RH-Emo's width and loss weights (method section 3).

    Args:
        width: factor of the heads' hidden width 4096; encoder and decoder always have the published widths.
        beta: weight of the supervised terms (0 in stage 1, 0.01 in stage 2).
        beta_class: weight of the emotion term among them.
        beta_vad: weight of each of the valence, arousal and dominance terms among them.
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
        normalisation: ``max`` (the paper's) or ``log``; both map the training part to [0, 1].
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
