"""The loss of the released research code: one cosine per row of Gram matrices over the whole batch."""
