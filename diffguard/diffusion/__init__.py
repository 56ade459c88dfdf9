"""The method's arithmetic: schedules, DDIM, guidance, early stop, and the plain loops that they make."""
