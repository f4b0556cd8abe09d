"""The training worker: `python -m tasks.training DIR`, alone or under torchrun. CPT and SFT are the same worker."""
