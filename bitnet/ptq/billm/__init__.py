"""BiLLM: post-training binarization with salient columns (arXiv:2402.04291), as published and better."""

from bitnet.ptq.billm.method import BiLLM
from bitnet.ptq.billm.planes import PlaneWeight
from bitnet.ptq.billm.stored import BlockBinary

__all__ = ["BiLLM", "BlockBinary", "PlaneWeight"]
