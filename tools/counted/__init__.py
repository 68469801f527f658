"""The GPU kernels' PTX as executed: what one tile of each zone takes, held to bounds, and times predicted from it."""
