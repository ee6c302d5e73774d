"""Sampling: the denoising loop and the parts it is put together from, and the functions that sample clips with them."""
