"""[probes.NAME]: numbers of single layers, measured every few steps (docs/probes.md, recipes/probes.py).

probed_step.py       a step that a probe measures, and the numbers recorded in it
groups.py            the groups of parameters: a layer, or a module of it
norms.py             norms of gradients, parameters and updates
activations.py       RMS and maximum of activations, dead and saturated units
attention_logits.py  maximum and entropy of the attention
layer_noise.py       gradient noise of each layer
"""

from components.probes.activations import Activations
from components.probes.attention_logits import AttentionLogits
from components.probes.layer_noise import LayerNoise
from components.probes.norms import Norms
from components.probes.probed_step import ProbedStep

__all__ = ["Activations", "AttentionLogits", "LayerNoise", "Norms", "ProbedStep"]
