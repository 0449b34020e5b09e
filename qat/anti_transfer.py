"""Anti-transfer learning: the frozen twin and the loss at the features of chosen layers.

Source: Guizzo et al., "Anti-transfer learning for task invariance in convolutional neural networks for speech
processing", 2021; in the quaternion domain: WASPAA 2023, equations 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.config import AntiTransferConfig
from qat.models.vgg import VGG16, tap_name
from qkernels import anti_transfer_loss


class AntiTransfer(nn.Module):
    r"""The anti-transfer term of the loss, summed over layers.

    .. math:: L_{AT} = \beta \sum_{s} \frac1B \sum_b \cos^2(G_p^{(s,b)}, G_t^{(s,b)})

    The twin (the frozen network of the orthogonal task) is always in eval mode, never has gradients and runs only up
    to the deepest layer asked for. The trained network's features come from the forward pass that makes its logits.

    Args:
        config: layers, beta, position and semantics.
        twin: network of the same shape, already holding the orthogonal task's weights.
    """

    def __init__(self, config: AntiTransferConfig, twin: VGG16) -> None:
        super().__init__()
        self.taps = {tap_name(layer, config.position): layer for layer in config.layers}
        self.config = config
        self.twin = twin.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> AntiTransfer:
        super().train(mode)
        self.twin.eval()
        return self

    def forward(self, inputs: Tensor, features: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, and each layer's unweighted cos^2 for the log.

        Args:
            inputs: what the trained network was given, `[B, ...]`; the twin sees the same.
            features: the trained network's feature maps by tap name.

        Returns:
            The scalar loss, and ``{"similarity_<layer>": scalar}`` without gradient.
        """
        with torch.no_grad():
            frozen = self.twin.features_at(inputs, self.taps)
        folded = self.config.semantics == "folded-rowwise"
        weight = self.config.beta**2 if folded else self.config.beta
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            losses = {
                f"similarity_{layer}": anti_transfer_loss(
                    features[tap], frozen[tap], semantics=self.config.semantics, clamp=self.config.clamp
                )
                for tap, layer in self.taps.items()
            }
        total = weight * torch.stack(list(losses.values())).sum()
        return total, {name: loss.detach() for name, loss in losses.items()}
