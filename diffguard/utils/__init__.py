"""What every part of the library uses and none owns."""
