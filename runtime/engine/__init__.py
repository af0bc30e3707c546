"""The engines that decode generations; `base` is the contract of them all."""
