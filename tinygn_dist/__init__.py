"""Compress Hugging Face models inside distributed Accelerate jobs."""

from tinygn_dist.config import Config, load_config
from tinygn_dist.integrations.compressor import Compressor
from tinygn_dist.pipeline import compress

__all__ = ["Compressor", "Config", "compress", "load_config"]
