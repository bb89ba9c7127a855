"""Parts of trained models taken away: weights by masks; heads, neurons, branches and layers for good."""
