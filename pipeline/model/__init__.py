"""The denoiser, written for one device: hyper-parameters, rotary tables, blocks, and the loading of its weights.

Knows nothing of prompts, files of picture and sound, sampling, configuration or ranks.
"""
