"""The networks: VGG16 in three domains, RH-Emo, and the speech classifier that combines them."""

from qat.models.classifier import SpeechClassifier
from qat.models.rhemo import RHEmo, RHEmoEncoder
from qat.models.vgg import VGG16, tap_name

__all__ = ["VGG16", "RHEmo", "RHEmoEncoder", "SpeechClassifier", "tap_name"]
