"""Gradients that do not outlive backward: used at once, or summed in a few bits."""
