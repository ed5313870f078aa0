"""Parts of pruning and training: masks, scores, surgery, costs, losses and the training loop."""
