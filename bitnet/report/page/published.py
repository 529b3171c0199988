"""Results of papers, to lay over one's own: other models on other texts, in the bits that the papers go by."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """One quantized model of a paper. Its gap is ln(perplexity / perplexity of the paper's own full precision)."""

    label: str
    bits: float  # as claimed: scales and what else a file holds are not counted
    full: float  # perplexity
    quantized: float  # perplexity
    text: str
    source: str

    @property
    def gap(self) -> float:
        """Nats a token above full precision."""
        return math.log(self.quantized / self.full)


_A48 = "BitNet a4.8, arXiv:2411.04965, table 1"
_PARETOQ = "ParetoQ, arXiv:2502.02631"
_B1 = "BitNet, arXiv:2310.11453, table 3"

PUBLISHED = (
    Published("BitNet b1.58 700M", 1.58, 11.44, 12.32, "C4", _A48),
    Published("ParetoQ 125M ternary", 1.58, 15.1, 20.0, "wikitext", _PARETOQ),
    Published("ParetoQ 125M binary", 1.0, 15.1, 25.8, "wikitext", _PARETOQ),
    Published("ParetoQ 1B ternary", 1.58, 8.0, 10.0, "wikitext", _PARETOQ),
    Published("ParetoQ 1B binary", 1.0, 8.0, 12.8, "wikitext", _PARETOQ),
    Published("BitNet b1 6.7B", 1.0, 15.19, 17.07, "the paper's validation text", _B1),
    Published("GPTQ 6.7B", 4.0, 15.19, 16.05, "the paper's validation text", _B1),
    Published("QuIP 6.7B", 2.0, 15.19, 70.4, "the paper's validation text", _B1),
    Published("GPTQ 6.7B", 2.0, 15.19, 1032.0, "the paper's validation text", _B1),
)
