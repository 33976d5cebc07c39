"""Third-party networks behind small types of ours, one module for each kind of part; importers name the modules.

The only package that names diffusers or transformers, so that an upgrade touches one place. Every part is built on the
meta device from the checkpoint's own metadata and filled strictly under its published names. The denoiser is ours and
lives in `pipeline/model`; what the parts are used for is in `engine.py`.
"""
