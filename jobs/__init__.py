"""What a person starts: one page a command. Compose, build, run, exit code; Hydra stops here."""
