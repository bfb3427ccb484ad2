"""What a trained model does inside, read from traces of its attention: one file a kind of question."""
