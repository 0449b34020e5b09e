"""The settings of a training: typed objects, plain data, presets."""

from qat.config.experiment import (
    EXECUTION,
    WINDOW,
    AntiTransferConfig,
    AnyExperiment,
    CorpusConfig,
    Domain,
    Experiment,
    NetworkConfig,
    RHEmoConfig,
    RHEmoExperiment,
    SpectrogramConfig,
    SplitConfig,
    Task,
    TrainingConfig,
)
from qat.config.plain import difference, flatten, from_plain, identity_settings, prefix_errors, to_plain, typed_setting

__all__ = [
    "EXECUTION",
    "WINDOW",
    "AntiTransferConfig",
    "AnyExperiment",
    "CorpusConfig",
    "Domain",
    "Experiment",
    "NetworkConfig",
    "RHEmoConfig",
    "RHEmoExperiment",
    "SpectrogramConfig",
    "SplitConfig",
    "Task",
    "TrainingConfig",
    "difference",
    "flatten",
    "from_plain",
    "identity_settings",
    "prefix_errors",
    "to_plain",
    "typed_setting",
]
