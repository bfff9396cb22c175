"""Words and pictures of what was measured: pages, notes, comparisons, tables."""
