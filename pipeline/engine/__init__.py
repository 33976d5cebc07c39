"""From a request to frames and sound: text, noise, sampling, upsampling, decoding, as a recipe says.

Returns arrays; does not write files, commit, or count money.
"""
