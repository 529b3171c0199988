"""A callback that makes training slow, so that a time limit falls into it on any machine."""

import time

from lightning import Callback, LightningModule, Trainer


class Pace(Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        time.sleep(self.seconds)
