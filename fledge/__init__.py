"""fledge raises a ChatGPT from raw text; see README.md."""

__version__ = "0.1.0"
