"""The transform codec: what is predicted is not coded, and the rest in the basis that needs the
fewest bits.
"""
