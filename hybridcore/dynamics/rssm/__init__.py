"""Ensemble of recurrent state-space models of a training run."""
