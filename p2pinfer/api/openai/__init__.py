"""OpenAI's dialect: models, chat completions, completions."""
