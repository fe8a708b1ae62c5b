"""Builders of costly artifacts: expert trajectories, trained here or imported."""
