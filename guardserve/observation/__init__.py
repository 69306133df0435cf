"""Reading what enters BatchNorm layers: a few tensor operations a layer, no judging."""
