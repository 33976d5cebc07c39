"""Files of picture and sound: numpy arrays in, MP4 and JPEG out, and reading back what was written. No torch here."""
