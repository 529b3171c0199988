"""The composition root: a Hydra configuration in, a run's folder with its record out. See `bitnet.experiment.run`."""
