"""From a user's JAX function to the graph the other rooms plan: the only room that reads jaxprs."""

from autopar.trace.boundary import layer_boundary
from autopar.trace.capture import capture
from autopar.trace.grad_equation import grad, value_and_grad
from autopar.trace.traced import Leaf, Traced

__all__ = ["Leaf", "Traced", "capture", "grad", "layer_boundary", "value_and_grad"]
