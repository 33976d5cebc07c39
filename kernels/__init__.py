"""Tensor operations of the denoiser: the plain torch definitions and the set of slots that a model is built with.

Nothing here knows a model, a checkpoint or a rank. Import the modules directly; nothing is re-exported.
"""

# transformers and diffusers look for a distribution named `kernels` and read this version when they find a package of
# that name: without it their probe raises, with "0" it reports that the distribution is absent, which is the truth.
__version__ = "0"
