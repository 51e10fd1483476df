"""What a layer or a model costs, without a clock: launches, FLOPs, bytes and the roofline of a GPU."""
