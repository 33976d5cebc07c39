"""Everything that knows a rank: groups of processes, what they exchange, and a denoiser spread over them.

The denoiser itself is written for one device and does not know of this; nor do sampling and guidance.
"""
