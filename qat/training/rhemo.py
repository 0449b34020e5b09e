"""Training of RH-Emo, the autoencoder whose embeddings are the inputs of quaternion networks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qat.config import RHEmoExperiment
from qat.data.rows import Rows
from qat.files import write_json
from qat.models import RHEmo
from qat.models.layers import placed
from qat.training import distributed
from qat.training.checkpoint import load_checkpoint
from qat.training.data import Spectrograms, load_data, rhemo_targets
from qat.training.metrics import Metrics
from qat.training.objectives import TERMS, RHEmoObjective
from qat.training.pretrained import check_inputs
from qat.training.run import open_run, parameter_count


def pretrain_rhemo(
    experiment: RHEmoExperiment,
    folder: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    name: str | None = None,
    profile: bool = False,
    strict: bool = False,
) -> Metrics:
    """Train one stage of RH-Emo; stage 2 starts from stage 1, which ``training.initial`` names.

    For each part the result has, beside the losses, ``constant`` (reconstruction loss of the best constant predictor)
    and ``live_channels`` (number of the four embedding channels whose deviation exceeds 1 % of the largest).

    Args, Raises: as :func:`qat.training.classifier.train_classifier`.
    """
    with open_run(experiment, folder, resume=resume, quiet=quiet, name=name, profile=profile) as (run, finished):
        if finished is not None:
            return finished
        device, training = run.device, experiment.training
        distributed.require_one_process("RH-Emo, whose batch norm mixes the samples of a batch,")
        torch.manual_seed(training.seed)
        model = RHEmo(experiment.rhemo)
        if training.initial is not None:
            initial = load_checkpoint(training.initial, "rhemo")
            check_inputs(experiment, initial, "training.initial")
            initial.load_into(model)
        data = load_data(experiment, quiet=quiet, strict=strict)
        targets = rhemo_targets(data.index)
        annotated = [
            term for term, missing in zip(TERMS, targets[data.used].isnan().all(0), strict=True) if not missing
        ]
        objective = RHEmoObjective(placed(model, device), experiment.rhemo, annotated)
        examples = data.examples(
            inputs=Rows.within(data.spectrograms.rows, data.used, device, training.data_mib),
            targets=Rows(targets.to(device), device),
        )
        result, _ = run.train(objective, model, data, examples, lambda outputs, targets: {}, {"kind": "rhemo"})
        for part, numbers in data.parts.items():
            result["parts"][part] |= _embedding_health(model, data.spectrograms, torch.tensor(numbers), device)
        result["parameters"] = parameter_count(model)
        if distributed.rank() == 0:
            write_json(folder / "result.json", result)
        return result


def _embedding_health(model: RHEmo, spectrograms: Spectrograms, samples: Tensor, device: torch.device) -> Metrics:
    """Signs that the autoencoder has learnt: the loss of the best constant, and the number of channels that vary."""
    pixels, embeddings = [], []
    model.eval()
    with torch.no_grad():
        for numbers in samples.split(64):
            x = spectrograms(numbers).to(device).clamp(0, 1)
            pixels.append(x.double().mean((1, 2, 3)).cpu())
            embeddings.append(model.encoder(x).cpu())
    mean = torch.cat(pixels).mean()
    constant = -(mean * mean.log() + (1 - mean) * (1 - mean).log())
    deviation = torch.cat(embeddings).transpose(0, 1).flatten(1).std(1)
    return {"constant": constant.item(), "live_channels": int((deviation > 0.01 * deviation.max()).sum())}
