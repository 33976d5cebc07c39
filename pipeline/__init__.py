"""The render farm: rows to clips to dollars. Its floors, and who may import whom: README.md, "The house"."""
