"""From audio files to network inputs: manifests, corpora, spectrograms, the store and the splits."""
