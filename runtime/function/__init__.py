"""What a function's author meets: handler, `context.model`, testing, reload."""
