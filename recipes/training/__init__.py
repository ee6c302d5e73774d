"""The training engine shared by all stages: one loop, its settings, checkpoints, streams of samples, run folder."""
