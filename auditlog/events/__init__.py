"""What happened: the models of an event, and its form as one line."""
