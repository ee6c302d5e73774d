"""How good generated videos are: distances between sets of clips, scores of one set, and what measured them."""
