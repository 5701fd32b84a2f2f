"""Ollama's dialect: chats and texts as lines of JSON, and its lists of models."""
