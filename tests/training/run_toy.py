"""A training run of its own process, to be interrupted or killed: ``run_toy.py ROOT [resume]``."""

import sys
import warnings
from pathlib import Path

import torch
from toy_training import ToyData, ToyLanguageModel, toy_module, toy_trainer

from bitnet.training import LastAndBest

STEPS = 1_000_000


def main() -> None:
    root = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module = toy_module(STEPS, model=ToyLanguageModel(width=256, dropout=0.1))
    trainer = toy_trainer(
        root, STEPS, [LastAndBest(every_n_steps=1)], enable_checkpointing=True, accumulate_grad_batches=2
    )
    trainer.fit(module, datamodule=ToyData(), ckpt_path=root / "checkpoints/last.ckpt" if sys.argv[2:] else None)


if __name__ == "__main__":
    main()
