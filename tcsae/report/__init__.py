"""What people read: one-file HTML pages and notes of a run and of a comparison."""
