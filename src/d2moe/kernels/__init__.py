"""The compute back ends: `native` (compiled) and `reference` (NumPy, the readable definition). Both have the same
classes with the same methods, so that one engine and one set of models run on either."""
