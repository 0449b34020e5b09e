"""Embeddings of a frozen RH-Emo: computed once for all trainings that read them."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qat.config import to_plain
from qat.data.rows import Read
from qat.data.store import read_array, write_header
from qat.files import make_once, write_json
from qat.models import RHEmoEncoder, SpeechClassifier
from qat.processes import bar
from qat.training import distributed
from qat.training.data import Spectrograms
from qkernels.runtime.precision import switched

LAYOUT = 1
"""Version of the files; raised whenever their meaning changes, so that old embeddings are not read."""
_BATCH = 64


def stored_embeddings(
    classifier: SpeechClassifier, spectrograms: Spectrograms, folder: Path, device: torch.device, *, quiet: bool
) -> Read | None:
    """What :func:`embeddings` gives; None for a classifier without frozen encoder, or whose words are placed anew."""
    if classifier.encoder is None or classifier.config.rhemo_mode != "frozen" or spectrograms.placing is not None:
        return None
    return embeddings(classifier.encoder, spectrograms, folder, device, quiet=quiet)


def embeddings(
    encoder: RHEmoEncoder, spectrograms: Spectrograms, folder: Path, device: torch.device, *, quiet: bool
) -> Read:
    """Embeddings `[B, 4, 64, 64]` of prepared samples by number, in float32.

    The first call with the same weights, spectrograms and normalisation computes the embeddings of all samples and
    writes them to disk, from where they are read. Rank 0 computes, then the others read.

    Args:
        encoder: encoder on ``device``; it is set to eval mode.
        spectrograms: spectrograms to embed.
        folder: cache; the embeddings are in a sub-folder named after a hash of all that they depend on, which is
            complete or absent. Another process that needs it meanwhile waits.
        device: device to compute on; a GPU rounds differently from a CPU, so each type has its own embeddings.
        quiet: no progress bar.
    """
    weights = hashlib.sha256()
    for name, tensor in encoder.eval().state_dict().items():
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    settings = {
        "layout": LAYOUT,
        "encoder": weights.hexdigest(),
        "spectrograms": spectrograms.store.folder.name,
        "normalisation": to_plain(spectrograms.normalisation),
        "device": device.type,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    target = folder / f"embeddings-{key[:16]}"
    with distributed.leader_first():
        make_once(target, partial(_write, settings, encoder, spectrograms, device, quiet))
    table = read_array(target / "embeddings.npy", (len(spectrograms.store), 4, 64, 64))
    return lambda numbers: torch.from_numpy(table[numbers.numpy()])


def _write(
    settings: dict[str, Any],
    encoder: RHEmoEncoder,
    spectrograms: Spectrograms,
    device: torch.device,
    quiet: bool,
    folder: Path,
) -> None:
    with torch.no_grad(), switched("float32"), bar(not quiet) as progress:
        numbers = torch.arange(len(spectrograms.store))
        task = progress.add_task("Embeddings", total=len(numbers))
        with (folder / "embeddings.npy").open("wb") as out:
            write_header(out, (len(numbers), 4, 64, 64))
            for block in numbers.split(_BATCH):
                out.write(encoder(spectrograms(block).to(device)).cpu().numpy().tobytes())
                progress.advance(task, len(block))
        write_json(folder / "meta.json", settings)
