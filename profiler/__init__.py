"""What is recorded and kept: the profile, the recorder, prompt sets and the run loop."""
