"""Third floor: heads that work together, and whether they hold on other conflicts."""
