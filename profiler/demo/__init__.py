"""The embedded demo: two small trained models and a prompt set whose answer is known."""
