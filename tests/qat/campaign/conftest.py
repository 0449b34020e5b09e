from pathlib import Path

import pytest

from qat.data.corpora import demo

TINY = """
- settings: {training: {epochs: 1, patience: 1, device: cpu, checkpoint_seconds: 0}}
- when: {network: [quaternion, real]}
  settings: {network: {width: 0.01}}
- when: {stage: [rhemo-1, rhemo-2]}
  settings: {rhemo: {width: 0.01}, corpus: {where: {kind: [sentence], speaker: [f2, m1, m3]}}}
- when: {stage: speaker}
  settings: {corpus: {where: {kind: [sentence], speaker: [f2, m1, m3]}}}
- when: {stage: word}
  settings: {corpus: {where: {kind: [word], speaker: [f2, m1, m3]}}}
- when: {stage: emotion, split: [actor, confounded]}
  settings: {split: {train: [f2, m1, m3], validation: [f3], test: [f1, m4]}}
"""


@pytest.fixture(scope="package")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a miniature demo corpus, `demo`, and overrides for tiny networks for it, `tiny.yaml`."""
    folder = tmp_path_factory.mktemp("small")
    voices = {"train": ["f2", "m1", "m3"], "validation": ["f3"], "test": ["f1", "m4"]}
    demo.make(folder / "demo", voices=voices, sentences=demo.SENTENCES[:5], words=demo.WORDS[:3], progress=False)
    (folder / "tiny.yaml").write_text(TINY)
    return folder


@pytest.fixture
def tiny(small: Path) -> list[str]:
    """Options of a command that trains on it."""
    return ["--folders", f"{{demo: {small / 'demo'}}}", "--settings", str(small / "tiny.yaml"), "--cluster", "local"]
