"""The commands of `glowplug`, one module each, which is imported when its command is called."""
