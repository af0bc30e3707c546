"""OpenAI's bodies as requests, and answers as its bodies."""
