"""Post-training quantization: methods, and the driver that takes them through a model block by block."""

from bitnet.ptq.arb import ARBLLM
from bitnet.ptq.billm import BiLLM
from bitnet.ptq.bitsandbytes import BitsAndBytes4Bit, LLMInt8
from bitnet.ptq.driver import quantize
from bitnet.ptq.gptq import GPTQ
from bitnet.ptq.hqq import HQQ
from bitnet.ptq.initialise import initialise
from bitnet.ptq.kquants import KQuant
from bitnet.ptq.pbllm import PBLLM
from bitnet.ptq.protocol import LayerStats, PTQMethod, Statistic
from bitnet.ptq.rtn import RoundToNearest
from bitnet.ptq.settings import Driver, LayerResult
from bitnet.ptq.starts import Compensated, FromMethod, LeastSquares

__all__ = [
    "ARBLLM",
    "GPTQ",
    "HQQ",
    "PBLLM",
    "BiLLM",
    "BitsAndBytes4Bit",
    "Compensated",
    "Driver",
    "FromMethod",
    "KQuant",
    "LLMInt8",
    "LayerResult",
    "LayerStats",
    "LeastSquares",
    "PTQMethod",
    "RoundToNearest",
    "Statistic",
    "initialise",
    "quantize",
]
