"""The networks: VGG16 in three domains and RH-Emo."""

from qat.models.rhemo import RHEmo, RHEmoEncoder
from qat.models.vgg import VGG16, tap_name

__all__ = ["VGG16", "RHEmo", "RHEmoEncoder", "tap_name"]
