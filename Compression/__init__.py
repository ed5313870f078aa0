"""The method: content mask, scores, selection, surgery, distillation, training."""
