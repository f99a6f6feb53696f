"""``fastgt train``: published trainings that may be interrupted at any moment."""
