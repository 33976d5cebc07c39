"""Everything that knows a rank: one model over several GPUs of a host.

The model itself is written for one device (`pipeline/model`); what is here slices, wraps and adds up around it.
"""
