"""What a model is worth: how well it predicts a text, and how many bits it takes."""

from bitnet.evaluation.footprint import Footprint, LayerFootprint, footprint
from bitnet.evaluation.perplexity import LossSummary, evaluate_loss

__all__ = ["Footprint", "LayerFootprint", "LossSummary", "evaluate_loss", "footprint"]
