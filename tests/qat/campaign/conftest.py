from dataclasses import replace

import pytest

from qat.campaign.study import Study, synthetic
from qat.config import CorpusConfig, TrainingConfig
from qat.data.corpora import demo


@pytest.fixture(scope="module")
def tiny_study(tmp_path_factory) -> Study:
    """Every stage for real, on a few clips with the smallest networks."""
    folder = tmp_path_factory.mktemp("study")
    voices = {"train": ["f2", "m1", "m3"], "validation": ["f3"], "test": ["f1", "m4"]}
    material = synthetic(folder / "corpus")
    recipe = material.recipes["small"]
    once = TrainingConfig(lr=1e-3, epochs=1, device="cpu")
    tiny = replace(
        recipe,
        network=replace(recipe.network, width=0.01),
        rhemo=replace(recipe.rhemo, width=0.01),
        **{stage: once for stage in ("stage1", "stage2", "voice", "word", "emotion")},
    )

    def where(config: CorpusConfig) -> CorpusConfig:
        heard = {"speaker": voices["train"]} if "speaker" in config.where else {}
        return replace(config, where=config.where | heard)

    material = replace(
        material,
        obtain=lambda: demo.make(
            folder / "corpus", voices=voices, sentences=demo.SENTENCES[:5], words=demo.WORDS[:3], progress=False
        ),
        rhemo=where(material.rhemo),
        voice=where(material.voice),
        word=where(material.word),
        split=lambda seed: replace(synthetic(folder).split(seed), **voices),
        recipes={"small": tiny},
    )
    return Study(folder, material)
