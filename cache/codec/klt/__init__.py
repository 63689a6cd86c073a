"""The transform codec: predict each state from what is known, and code the rest in the basis that
needs the fewest bits.
"""
