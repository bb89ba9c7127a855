"""Operations around the products of a layer, in C++ (`native/src/layers.cpp`): each a single pass over memory.

Backward computes what it needs again from the inputs. Where torch has a single operator, small inputs are left to it:
there a call of one of these, about 20 us and 100 us more with gradients, costs more than it saves.
"""
