"""moescope: which experts does a Mixture-of-Experts model use, where, and is there a pattern to it?"""

__version__ = "0.1.0"
