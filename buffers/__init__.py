"""Train or import buffers of networks: expert trajectories and teachers."""
