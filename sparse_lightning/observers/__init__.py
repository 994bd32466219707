"""Those who only look on at a training: loggers, terminal, recorder, and what others monitor."""
