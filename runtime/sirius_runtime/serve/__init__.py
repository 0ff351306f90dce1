"""`sirius serve`: the OpenAI API over a batch that requests join and leave between periods."""
