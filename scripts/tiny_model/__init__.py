"""Makes models without a model hub: a trained one that talks about Glowplug, and random ones of any size."""
