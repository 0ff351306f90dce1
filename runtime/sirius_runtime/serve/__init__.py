"""`sirius serve`: the OpenAI API over continuous batching."""
