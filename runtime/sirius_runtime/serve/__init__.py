"""`sirius serve`: the OpenAI API with continuous batching; requests join and leave between periods."""
