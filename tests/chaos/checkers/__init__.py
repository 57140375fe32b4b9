"""Pure judges of histories: what clients were told, against what is there. Each gives its complaints as sentences."""
