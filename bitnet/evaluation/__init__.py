"""What a model is worth: how well it predicts a text, how far it is from another model, and how many bits it takes."""

from bitnet.evaluation.footprint import Footprint, LayerFootprint, footprint
from bitnet.evaluation.perplexity import LossSummary, evaluate_loss
from bitnet.evaluation.protocol import BlocksProtocol, TextProtocol
from bitnet.evaluation.tasks import evaluate_tasks
from bitnet.evaluation.text import TextEvaluation, evaluate_text

__all__ = [
    "BlocksProtocol",
    "Footprint",
    "LayerFootprint",
    "LossSummary",
    "TextEvaluation",
    "TextProtocol",
    "evaluate_loss",
    "evaluate_tasks",
    "evaluate_text",
    "footprint",
]
