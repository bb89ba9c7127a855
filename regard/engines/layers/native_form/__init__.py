"""The operations around the matrix products of a layer in C++ (`native/src/layers.cpp`), each in one pass over memory.

Backward recomputes what it needs from the inputs. Where torch has a single operator, small inputs are left to it: the
overhead of a native call, about 20 us, or 100 us more with gradients, would exceed the gain.
"""
